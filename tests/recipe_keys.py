"""``docs/keys.py``, which makes the tables of keys and the JSON schema, as a module for the tests."""

from pathlib import Path

from by_path import module_at

PATH = Path(__file__).resolve().parents[1] / "docs" / "keys.py"
keys = module_at(PATH)

"""``docs/keys.py``, which makes the tables of keys and the JSON schema, as a module for the tests."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "docs" / "keys.py"
_spec = importlib.util.spec_from_file_location("keys", PATH)
keys = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(keys)

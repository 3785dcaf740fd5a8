"""Modules that lie beside the package, such as examples and the maker of tables, for the tests."""

import importlib.util


def module_at(path):
    """Runs a file of Python and returns it as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

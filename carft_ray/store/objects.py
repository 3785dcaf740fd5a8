"""What every store is: named objects under one address, such as ``log/00000001``. They appear whole or not at all.

A name has pieces, joined by ``/``; what begins with the pieces of a name lies under it.
"""

import fnmatch
import secrets
from typing import Protocol

from carft_ray.errors import Problem, StorageError
from carft_ray.files import REMAINS
from carft_ray.layout import COMMITS
from carft_ray.untrusted import visible

PROBE = "probe-"  # how the name of an object begins that ``probe`` makes and removes
Names = list[str]  # in a class with a method ``list``, that word means the method


class RefusedError(StorageError):
    """An object was not created: its name is there already."""


class UnknownError(StorageError):
    """It is not known whether an object was written: the answer is missing, and it may still appear."""


class Store(Protocol):
    """What a study needs of a store. ``str`` gives its address, for messages.

    All methods raise a ``StorageError`` for a name that could lead out of the store (``check_name``), and when the
    store cannot be read or written.
    """

    def get(self, name: str) -> bytes | None:
        """Returns the content of an object; None when there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, over one that is there; it is durable when this returns."""

    def put_new(self, name: str, data: bytes) -> None:
        """Creates an object; of several that try at once, one does. Durable when this returns.

        Raises:
            RefusedError: The name is there; whose it is, its content tells.
            UnknownError: The answer is missing; ask again.
            StorageError: It was not created.
        """

    def list(self, prefix: str, after: str = "") -> Names:
        """Returns the names under ``prefix`` that sort after ``after``, in order: those are there, others may be too.

        Args:
            prefix: A name; empty for all.
            after: A name; empty for all.
        """

    def remove(self, prefix: str) -> None:
        """Removes the object of this name and all under it, if there are any."""


def check_name(name: str) -> str:
    """Returns a name that is one of an object.

    Raises:
        StorageError: It could lead out of the store, or is one of the temporary names of ``files``.
    """
    is_plain = visible(name) == name and not set(name) & set("\\\n\t")  # no control characters, no halves of surrogates
    if not is_plain or any(piece in ("", ".", "..") or fnmatch.fnmatch(piece, REMAINS) for piece in name.split("/")):
        raise StorageError(Problem(visible(name), "must be a name of an object, such as log/00000001"))
    return name


def probe(store: Store) -> None:
    """Checks that a store refuses to create what is there; leaves nothing behind.

    Raises:
        StorageError: It does not, or cannot be written.
    """
    name = f"{COMMITS}/{PROBE}{secrets.token_hex(8)}"
    try:
        store.put_new(name, b"first")
        store.put_new(name, b"second")
    except RefusedError:
        return
    finally:
        store.remove(name)
    rule = "must refuse to create an object that is there, so that two searches cannot spoil one study"
    raise StorageError(Problem(str(store), rule, "one that writes over it", next_step="Give another folder or bucket."))

"""A store in a bucket: of S3 or what speaks like it, of Google's or Azure's; by obstore.

Who one is, the environment says (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` and the like); nothing of it gets into
an object, a file or a message. Names are as in ``store.folder``.
"""

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carft_ray import files
from carft_ray.errors import Problem, StorageError, UsageError, nearest
from carft_ray.store.folder import Names, RefusedError, Store, UnknownError, check_name
from carft_ray.untrusted import read_regular, visible

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
TESTED = ("s3",)
TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 5.0  # of one request
RETRY_FOR_S, MAX_RETRIES = 60.0, 5  # of one operation but ``put_new`` and ``look``
LOG_TIMEOUT_S = 10.0  # of one request of these two, which are not repeated: the log asks again itself
PIECE_BYTES = 16 * 2**20  # what one request carries of a large file

_CONTAINER = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_STATUS, _CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w{1,64})</Code>")
_UNCLEAR = (408, 409, 425, 429)  # of the statuses 4xx, those after which an object may be there, or that pass
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_KEYS = "Set valid keys in the environment (AWS_ACCESS_KEY_ID and so on), then run the same command again."
_STEPS = {  # what to do after a code of the server
    **dict.fromkeys(_NO_BUCKET, "Create the bucket first, or correct the address."),
    **dict.fromkeys(("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"), _KEYS),
    "RequestTimeTooSkewed": "Set the clock of this machine, then run the same command again.",
    "AccessDenied": "Let the keys list, read, write and delete below this address (docs/storage.md).",
    "NotImplemented": "Give a bucket whose server refuses to overwrite an object (If-None-Match).",
}
_OTHER_STEP = "Check that the endpoint can be reached and that the keys are valid, then run the same command again."

Tag = dict[str, str]  # which version of an object it is: its ETag, and its number where a server counts (gs://)

logger = logging.getLogger(__name__)
_warned: set[str] = set()  # schemes


class _MissingError(Exception):
    """There is no such object."""


@dataclass(frozen=True)
class Listed:
    """An object as a listing shows it.

    Attributes:
        num_bytes: Its size.
        stamp_ns: When it was written, to the second, in nanoseconds since 1970; of its ETag a hash in place of those
            below. A file that ``download`` has written has it as its time: with the size it says which version it is.
    """

    num_bytes: int
    stamp_ns: int


class Bucket(Store):
    """A store at an address such as ``s3://bucket/prefix``, which ``str`` gives.

    All methods raise a ``StorageError`` for a name that is none (``check_name``), and when the bucket does not do what
    it is asked for: with the server's code.

    Args:
        address: ``s3://``, ``gs://`` or ``az://``, a bucket, and perhaps a prefix.

    Raises:
        UsageError: It is no such address, or obstore is not installed.
    """

    has_packs = True

    def __init__(self, address: str) -> None:
        scheme, place = parsed(address)
        self.address = f"{scheme}://{place}"
        self._store = _opened(self.address, MAX_RETRIES, TIMEOUT_S)
        self._api = importlib.import_module("obstore")
        self._once = _opened(self.address, 0, LOG_TIMEOUT_S)  # a retry would take its own first try for another's
        if scheme not in TESTED and scheme not in _warned:
            _warned.add(scheme)
            logger.warning("buckets of %s:// were not tested with carft-ray; only those of s3:// were", scheme)

    def __str__(self) -> str:
        return self.address

    def get(self, name: str) -> bytes | None:
        """Returns the content of an object; None when there is none."""
        return self._read(self._store, name)

    def look(self, name: str) -> bytes | None:
        """As ``get``, by one short request."""
        return self._read(self._once, name)

    def written(self, name: str) -> float | None:
        """Returns when an object was written, in seconds since 1970 by the clock of the server; None: there is none."""
        listed = self.stat(name)
        return None if listed is None else listed.stamp_ns / 1e9

    def _read(self, store: "ObjectStore", name: str) -> bytes | None:
        check_name(name)
        try:
            with self._errors(name, "must be readable"):
                found = self._api.get(store, name)
                if (size := found.meta["size"]) <= files.MOST_JSON_BYTES:
                    return bytes(found.bytes())
        except _MissingError:
            return None
        rule = f"must have at most {files.MOST_JSON_BYTES:,} bytes, since it is read whole"
        raise StorageError(Problem(f"{self}/{name}", rule, f"{size:,}"))

    def put_new(self, name: str, data: bytes) -> None:
        """Creates an object, by one request. Of several that try at once, one does. Durable when this returns.

        Raises:
            RefusedError: The name is there, or another request is about to take it; whose it is, its content tells.
            UnknownError: The answer is missing or unclear: it may be there, or appear later; ask again.
            StorageError: It was not created.
        """
        check_name(name)
        with self._errors(name, "must be writable", UnknownError):
            self._api.put(self._once, name, data, mode="create", use_multipart=False)

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, over what is there. Durable when this returns."""
        check_name(name)
        with self._errors(name, "must be writable"):
            self._api.put(self._store, name, data, use_multipart=False)

    def tag(self, name: str) -> Tag | None:
        """Returns the ETag of an object; None when there is none."""
        with contextlib.suppress(_MissingError), self._errors(check_name(name), "must be readable"):
            return _tag(self._api.head(self._store, name))
        return None

    def put_over(self, name: str, data: bytes, tag: Tag | None) -> Tag:
        """Writes an object over the version with this ETag only; None: only where there is none.

        Returns:
            Its new ETag.

        Raises:
            RefusedError: Another version is there, perhaps from an earlier try of this call.
            UnknownError: As of ``put_new``.
            StorageError: It was not written.
        """
        check_name(name)
        mode: Any = "create" if tag is None else tag
        with self._errors(name, "must be writable", UnknownError):
            return _tag(self._api.put(self._store, name, data, mode=mode, use_multipart=False))

    def upload(self, name: str, path: Path) -> None:
        """As ``put``, for a file of any size: the object is there whole or not at all."""
        check_name(name)
        with files.writing(path):
            if path.stat().st_size <= PIECE_BYTES:  # it may grow meanwhile
                self.put(name, read_regular(path, files.MOST_JSON_BYTES, StorageError))
            else:
                with self._errors(name, "must be writable"):
                    self._api.put(self._store, name, path, chunk_size=PIECE_BYTES, max_concurrency=3)

    def download(self, name: str, path: Path) -> bool:
        """Writes an object to a file, whole or not at all; returns False when there is none.

        Its time is ``Listed.stamp_ns``.

        Raises:
            StorageError: As all methods; also when the object changes meanwhile, or the file cannot be written.
        """
        check_name(name)
        try:
            with files.new_file(path) as temporary, self._errors(name, "must be readable"):
                found = self._api.get(self._store, name)
                size, options = found.meta["size"], {"if_match": found.meta["e_tag"]}
                with open(temporary, "wb") as file:
                    if size <= PIECE_BYTES:
                        file.write(found.bytes())
                    for begin in range(0, size, PIECE_BYTES) if size > PIECE_BYTES else ():
                        end = min(begin + PIECE_BYTES, size)
                        piece: Any = {**options, "range": (begin, end)}
                        file.write(self._api.get(self._store, name, options=piece).bytes())
                    file.flush()
                    os.fsync(file.fileno())
                stamp_ns = _listed(found.meta).stamp_ns
                os.utime(temporary, ns=(stamp_ns, stamp_ns))
        except _MissingError:
            return False
        return True

    def piece(self, name: str, offset: int, num_bytes: int) -> bytes | None:
        """Returns a part of an object; None when there is none."""
        options: Any = {"range": (offset, offset + num_bytes)}
        with contextlib.suppress(_MissingError), self._errors(check_name(name), "must be readable"):
            return bytes(self._api.get(self._store, name, options=options).bytes())
        return None

    def list(self, prefix: str, after: str = "") -> Names:
        """As of ``Folder``."""
        depth = len(check_name(prefix).split("/")) + 1
        found = self._objects(prefix, after or None)
        names = {"/".join(each["path"].split("/")[:depth]) for each in found if each["path"].count("/") >= depth - 1}
        return sorted(name for name in names if name > after)

    def all(self, prefix: str = "", without: str = "") -> dict[str, Listed]:
        """Returns all objects under a name, or all, by name in order; ``without`` those under a name of one piece.

        Raises:
            StorageError: The name of one could lead out of a folder.
        """
        prefixes: Names = [prefix]
        found = {}
        if without:
            with self._errors(prefix, "must be readable"):
                top = self._api.list_with_delimiter(self._store, prefix or None)
            found = {each["path"]: _listed(each) for each in top["objects"]}
            prefixes = [each for each in top["common_prefixes"] if each != without]
        for each in prefixes:
            found |= {one["path"]: _listed(one) for one in self._objects(each)}
        folders = {"", *(name[:at] for name in found for at, letter in enumerate(name) if letter == "/")}
        return {
            check_name(name): found[name] for name in sorted(found.keys() - folders)
        }  # some mark folders by objects

    def stat(self, name: str) -> Listed | None:
        """Returns how an object would be listed; None when there is none."""
        with contextlib.suppress(_MissingError), self._errors(check_name(name), "must be readable"):
            return _listed(self._api.head(self._store, name))
        return None

    def remove(self, prefix: str) -> None:
        """As of ``Folder``."""
        self.delete([check_name(prefix), *(each["path"] for each in self._objects(prefix))])

    def delete(self, names: Names) -> None:
        """Removes objects, some of which may not be there."""
        if names:
            with contextlib.suppress(_MissingError), self._errors(names[0], "must be removable"):
                self._api.delete(self._store, names)

    def _objects(self, prefix: str, offset: str | None = None) -> Iterator[Any]:
        with self._errors(prefix, "must be readable"):
            for page in self._api.list(self._store, prefix or None, offset=offset, chunk_size=1000):
                yield from page

    @contextlib.contextmanager
    def _errors(self, name: str, rule: str, unclear: type[StorageError] = StorageError) -> Iterator[None]:
        """Turns what obstore raises into errors of ours; a name that is not there is a ``_MissingError``.

        What the server has said more than its code stays out: it may repeat keys.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        place = f"{self.address}/{name}" if name else self.address
        try:
            yield
        except (BaseError, FileNotFoundError, NotImplementedError) as error:
            status, code = (match[1] if (match := of.search(str(error))) else "" for of in (_STATUS, _CODE))
            if isinstance(
                error, AlreadyExistsError if unclear is StorageError else AlreadyExistsError | PreconditionError
            ):
                raise RefusedError(Problem(place, "already exists")) from None
            if isinstance(error, FileNotFoundError) and code not in _NO_BUCKET and unclear is StorageError:
                raise _MissingError from None
            value = f"{status} {code}".strip() or "no answer"
            is_clear = (status[:1] == "4" and int(status) not in _UNCLEAR) or status == "501"
            step = _STEPS.get(code, _KEYS if status == "401" else _OTHER_STEP)
            kind = StorageError if is_clear else unclear
            raise kind(Problem(place, rule, value, next_step=step)) from None


def parsed(address: str) -> tuple[str, str]:
    """Returns the scheme of an address, and bucket and prefix joined by ``/``.

    Raises:
        UsageError: It is none.
    """
    if nearly := files.NEAR_ADDRESS.fullmatch(address):
        near = None if "@" in address else visible("://".join(nearly.groups()))
        raise UsageError(
            Problem(f"{nearly[1]}:...", "must be an address of a bucket: s3://bucket/prefix", nearest=near)
        )
    match = files.ADDRESS.fullmatch(address)
    scheme, place = match.groups() if match else ("", "")
    if scheme not in SCHEMES:
        allowed = tuple(f"{each}://" for each in SCHEMES)
        near = nearest(f"{scheme}://", allowed) if scheme else None
        raise UsageError(Problem(visible(address), "must be an address of a bucket", "", allowed, near))
    bucket, _, prefix = place.strip("/").partition("/")
    if not _CONTAINER.fullmatch(bucket):  # a key that somebody has written before an @ is not repeated
        raise UsageError(Problem(f"{scheme}://...", "must be a bucket and perhaps a prefix: s3://bucket/prefix"))
    if prefix:
        check_name(prefix)
    return scheme, f"{bucket}/{prefix}".rstrip("/")


def _opened(address: str, max_retries: int, timeout_s: float) -> "ObjectStore":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError:
        step = "Install it: pip install 'carft-ray[bucket]'"
        raise UsageError(Problem(address, "needs the package obstore", next_step=step)) from None
    scheme, _, place = address.partition("://")
    bucket, _, prefix = place.partition("/")
    endpoints = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")]
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "allow_http": any(each.startswith("http://") for each in endpoints),
        },
        "retry_config": {"max_retries": max_retries, "retry_timeout": timedelta(seconds=RETRY_FOR_S)},
    }
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        opened: ObjectStore = kind(bucket, prefix=prefix or None, **options)
        return opened
    except BaseError:  # what it says may repeat keys
        raise StorageError(
            Problem(address, "cannot be opened with the keys of the environment", "", (), None, _KEYS)
        ) from None


def _tag(found: Any) -> Tag:
    return {key: found[key] for key in ("e_tag", "version") if found.get(key) is not None}


def _listed(meta: Any) -> Listed:
    written: datetime = meta["last_modified"]
    digest = blake2b((meta["e_tag"] or "").encode(), digest_size=8).digest()
    return Listed(meta["size"], int(written.timestamp()) * 10**9 + int.from_bytes(digest) % 10**9)

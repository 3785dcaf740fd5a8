"""Does what three commands of `aws s3` do, by boto3, where that program is not installed.

ls ADDRESS                                prints the names under an address; 1 without any
cp FILE ADDRESS
sync FOLDER ADDRESS --exclude PATTERN ... copies the files of a folder, in any order
"""

import fnmatch
import sys
from pathlib import Path

import boto3


def main(verb, *words):
    client = boto3.client("s3")
    bucket, _, prefix = next(word for word in words if word.startswith("s3://"))[5:].partition("/")
    if verb == "ls":
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        print(*(each["Key"] for each in found), sep="\n")
        return int(not found)
    source = Path(words[0])
    if verb == "cp":
        client.upload_file(source, bucket, prefix)
        return 0
    assert verb == "sync"
    left_out = [words[at + 1] for at, word in enumerate(words) if word == "--exclude"]
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
            client.upload_file(path, bucket, f"{prefix}/{name}")
    return 0


if __name__ == "__main__":
    assert sys.argv[1] == "s3"
    sys.exit(main(*sys.argv[2:]))

"""CIFAR-10 as the image folder that the benchmarks want: `python -m benchmarks.cifar cifar-10-binary.tar.gz FOLDER`.

The archive is the "binary version" of https://www.cs.toronto.edu/~kriz/cifar.html: no pickles. Written are all training
pictures and, of the test part, the first 500 of each class, as JPEG files of quality 75.
"""

from __future__ import annotations

import argparse
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # a label and a picture, channels first
QUALITY, TESTED = 75, 500


def write(archive: Path, folder: Path) -> Counter[str]:
    """How many pictures "train" and "test" have now."""
    written: Counter[str] = Counter()
    number: Counter[tuple[str, str]] = Counter()
    with tarfile.open(archive) as files:
        members = {Path(member.name).name: member for member in files.getmembers()}
        names = _read(files, members["batches.meta.txt"]).decode().split()
        for part, batches in (("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), ("test", ["test_batch.bin"])):
            for batch in batches:
                for record in np.frombuffer(_read(files, members[batch]), np.uint8).reshape(-1, RECORD):
                    name = names[record[0]]
                    if part == "test" and number[part, name] == TESTED:
                        continue
                    path = folder / part / name / f"{number[part, name]:04}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(record[1:].reshape(SHAPE).transpose(1, 2, 0)).save(path, quality=QUALITY)
                    number[part, name] += 1
                    written[part] += 1
    return written


def _read(files: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = files.extractfile(member)
    assert file, f"{member.name} is no file"
    return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        written = write(options.archive, options.folder)
    except (OSError, EOFError, KeyError, IndexError, ValueError, tarfile.TarError, zlib.error) as error:
        parser.error(
            f"{options.archive} is not the whole binary version of CIFAR-10, or cannot be written out: {error}"
        )
    print(f"{written['train']:,} training and {written['test']:,} test pictures in {options.folder}")


if __name__ == "__main__":
    main()

"""Fetches what llama.cpp's own tests read: vocabularies with texts and their token ids, and chat templates.

They lie in the source archive of llama-cpp-python, which pip downloads and nothing builds. What the tests here read is
unpacked below the prefix of the Python that runs this, where tests/llama_cpp.py looks; nothing of it is part of this
repository. Run it again and it does nothing.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

RELEASE = "llama-cpp-python==0.3.36"
FOLDER = Path(sys.prefix) / "share" / RELEASE.replace("==", "-")
WANTED = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[\w.-]+|templates/[\w.-]+\.jinja)")


def main() -> None:
    if FOLDER.is_dir():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", str(work), RELEASE], check=True)
        (archive,) = work.glob("*.tar.gz")
        found = work / "found"
        with tarfile.open(archive) as files:
            for member in files:
                if (match := WANTED.fullmatch(member.name)) and (source := files.extractfile(member)):
                    target = found / match[1]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
        found.rename(FOLDER)
    print(f"{sum(entry.is_file() for entry in FOLDER.rglob('*'))} files of {RELEASE} in {FOLDER}")


if __name__ == "__main__":
    main()

"""Generates the protobuf code in ``generated/`` from ``proto/``: ``python -m bank_service.wire.generate [--check]``.

The generated files are committed, so that an installation needs no compiler. Don't edit them. ``--check`` fails if they
differ from the contract's code.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

CONTRACT = "regrad/bank/v1/bank.proto"
# protoc's code imports its neighbour by the proto's path, but that file lies inside this package.
PROTOC_IMPORT = "from regrad.bank.v1 import bank_pb2"
PACKAGE_IMPORT = "from bank_service.wire.generated import bank_pb2"
PACKAGE_DOCSTRING = '"""Made by ``python -m bank_service.wire.generate``; never edited."""\n'


def compile_contract(proto_dir: Path) -> dict[str, str]:
    """File name → content of the generated package. RuntimeError if protoc rejects the contract."""
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise RuntimeError(
            "grpcio-tools must be installed to compile the contract; pip install '.[dev]' in the project's folder"
        ) from error
    well_known = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as out:
        arguments = ["protoc", f"-I{proto_dir}", f"-I{well_known}"]
        arguments += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", CONTRACT]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"{proto_dir / CONTRACT} must compile; protoc's message is above")
        folder = Path(out, CONTRACT).parent
        files = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    files["bank_pb2_grpc.py"] = files["bank_pb2_grpc.py"].replace(PROTOC_IMPORT, PACKAGE_IMPORT)
    return {"__init__.py": PACKAGE_DOCSTRING, **files}


def stale_files(files: dict[str, str], folder: Path) -> list[str]:
    """The names of files in ``folder`` that differ from ``files``, are missing, or don't belong there."""
    present = {path.name: path.read_text() for path in folder.glob("*.py*") if path.is_file()}
    return sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 where the files are stale")
    package = Path(__file__).resolve().parent
    parser.add_argument("--proto-dir", type=Path, default=package.parents[1] / "proto")
    options = parser.parse_args()
    folder = package / "generated"
    files = compile_contract(options.proto_dir.resolve())
    stale = stale_files(files, folder)
    if options.check:
        if stale:
            sys.stderr.write(f"{folder} is stale ({', '.join(stale)}); run python -m bank_service.wire.generate\n")
        return 1 if stale else 0
    folder.mkdir(exist_ok=True)
    for name in stale:
        if name in files:
            (folder / name).write_text(files[name])
        else:
            (folder / name).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

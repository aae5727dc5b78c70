"""Writes tests/tensorrt_api.json: the API of TensorRT's Python bindings, read from their wheels without TensorRT or a GPU.

    python -m pip download --no-deps --dest wheels tensorrt-cu12-bindings==10.15.1.29    # and other versions
    python tests/snapshot_tensorrt.py wheels/*.whl

The wheels must fit the Python that runs this, and a C compiler is needed: the bindings can be imported once the native
libraries that they link to exist, so empty ones are built. Nothing of TensorRT itself runs; only names, enums and
signatures are kept.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("tensorrt_api.json")
PACKAGE = "tensorrt_bindings"
# The project uses no layers and no plugins: the parser makes networks.
UNUSED = re.compile(r"I?Plugin|IPlugin|.*Layer$|.*Layer_|.*Calibrator|I\w*Algorithm|Dims\w+|.*(Uff|Caffe)")


def main(wheels: list[str]) -> None:
    snapshot = {}
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(wheel).extractall(folder)
            make_libraries(folder)
            snapshot.update(json.loads(read_in_process(folder)))
    ordered = dict(sorted(snapshot.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    lines = (json.dumps({version: api}, sort_keys=True)[1:-1] for version, api in ordered.items())
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{SNAPSHOT}: {', '.join(ordered)}")


def make_libraries(folder: str) -> None:
    """Builds empty libraries in place of those that the bindings link to, with every function that they import."""
    binding = os.path.join(folder, PACKAGE, "tensorrt.so")
    needed = re.findall(r"\[(libnv\w+\.so[\w.]*)\]", output_of("readelf", "-d", binding))
    imported = re.findall(r"^ +U (\w+)$", output_of("nm", "-D", "--undefined-only", binding), re.MULTILINE)
    names = [name for name in imported if re.search(r"INTERNAL|Plugin|OnnxParser|nvuffparser|nvcaffeparser", name)]
    source = os.path.join(folder, "empty.c")
    Path(source).write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for name in needed:
        out = os.path.join(folder, name)
        output_of("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", out, source)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_in_process(folder: str) -> str:
    """The API as JSON, from a process of its own: a process cannot import two versions of the bindings."""
    paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--read"],
        env={**os.environ, **paths},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def read() -> None:
    import tensorrt_bindings as tensorrt

    names = [name for name in dir(tensorrt) if not name.startswith("_") and not UNUSED.match(name)]
    members = {name: described(getattr(tensorrt, name)) for name in names}
    members = {name: api for name, api in members.items() if api is not None}
    members["__version__"] = {"type": "str"}
    print(json.dumps({tensorrt.__version__: members}))


def described(thing: Any) -> dict[str, Any] | None:
    if inspect.ismodule(thing):
        return None
    if not inspect.isclass(thing):
        return {"signatures": signatures(thing)} if callable(thing) else {"type": type(thing).__name__}
    if hasattr(thing, "__members__"):
        return {"enum": sorted(thing.__members__)}
    bases = [base.__name__ for base in thing.__mro__[1:] if base.__module__.startswith(PACKAGE)]
    members = {n: member(value) for n, value in vars(thing).items() if n == "__init__" or not n.startswith("_")}
    return {"bases": bases, "members": members}


def member(value: Any) -> dict[str, Any]:
    if isinstance(value, property):
        result = re.search(r"-> (.*)", inspect.getdoc(value.fget) or "")
        return {"property": short(result[1]) if result else None, "set": value.fset is not None}
    if inspect.isclass(value) and hasattr(value, "__members__"):
        return {"enum": sorted(value.__members__)}
    if callable(value):
        return {"signatures": signatures(value)}
    return {"type": type(value).__name__}


def signatures(value: Any) -> list[dict[str, Any]]:
    """The signatures in the docstring, where pybind11 writes one for each overload; empty where it is unknown."""
    lines = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> (.*)$", inspect.getdoc(value) or "", re.MULTILINE)
    return [{"takes": parameters(takes), "gives": short(gives)} for takes, gives in lines if takes != "*args, **kwargs"]


def parameters(text: str) -> list[str]:
    """The names of parameters, with = after those that have a default; commas inside brackets separate nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.split(":")[0].split("=")[0].strip() + ("=" if " = " in part else "") for part in parts if part.strip()]


def short(name: str) -> str:
    return re.sub(r"(\w+\.)+(?=\w)|\w+::(v_\d_\d::)?", "", name.strip())


if __name__ == "__main__":
    if sys.argv[1:] == ["--read"]:
        read()
    elif sys.argv[1:]:
        main(sys.argv[1:])
    else:
        sys.exit(__doc__)

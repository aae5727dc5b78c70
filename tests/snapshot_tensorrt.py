"""Writes tests/tensorrt_api.json: what TensorRT's Python bindings have, read from their wheels, without TensorRT or a GPU.

    python -m pip download --no-deps --dest wheels tensorrt-cu12-bindings==10.15.1.29    # and other versions
    python tests/snapshot_tensorrt.py wheels/*.whl

The wheels must fit the Python that runs this, and a C compiler is needed: the bindings import once the native libraries
that they link to can be found, so empty ones are made. Nothing of TensorRT itself runs; only names, enums and signatures
are kept.
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
# Of a layer or a plugin the project uses nothing: the parser makes networks.
UNUSED = re.compile(r"I?Plugin|IPlugin|.*Layer$|.*Layer_|.*Calibrator|I\w*Algorithm|Dims\w+|.*(Uff|Caffe)")


def main(wheels: list[str]) -> None:
    known = {}
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(wheel).extractall(folder)
            make_libraries(folder)
            known.update(json.loads(read_elsewhere(folder)))
    ordered = dict(sorted(known.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    lines = (json.dumps({version: api}, sort_keys=True)[1:-1] for version, api in ordered.items())
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{SNAPSHOT}: {', '.join(ordered)}")


def make_libraries(folder: str) -> None:
    """Empty stand-ins for the libraries that the bindings link to, with every function that they ask for."""
    binding = os.path.join(folder, PACKAGE, "tensorrt.so")
    needed = re.findall(r"\[(libnv\w+\.so[\w.]*)\]", told("readelf", "-d", binding))
    asked = re.findall(r"^ +U (\w+)$", told("nm", "-D", "--undefined-only", binding), re.MULTILINE)
    mine = [name for name in asked if re.search(r"INTERNAL|Plugin|OnnxParser|nvuffparser|nvcaffeparser", name)]
    source = os.path.join(folder, "empty.c")
    Path(source).write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in mine))
    for name in needed:
        out = os.path.join(folder, name)
        told("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", out, source)


def told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_elsewhere(folder: str) -> str:
    """The API as JSON, from a process of its own: two versions of the bindings do not fit into one."""
    place = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--read"],
        env={**os.environ, **place},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def read() -> None:
    import tensorrt_bindings as tensorrt

    names = [name for name in dir(tensorrt) if not name.startswith("_") and not UNUSED.match(name)]
    members = {name: described(getattr(tensorrt, name)) for name in names}
    members = {name: what for name, what in members.items() if what is not None}
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
    own = {name: member(what) for name, what in vars(thing).items() if name == "__init__" or not name.startswith("_")}
    return {"bases": bases, "members": own}


def member(what: Any) -> dict[str, Any]:
    if isinstance(what, property):
        got = re.search(r"-> (.*)", inspect.getdoc(what.fget) or "")
        return {"property": short(got[1]) if got else None, "set": what.fset is not None}
    if inspect.isclass(what) and hasattr(what, "__members__"):
        return {"enum": sorted(what.__members__)}
    if callable(what):
        return {"signatures": signatures(what)}
    return {"type": type(what).__name__}


def signatures(what: Any) -> list[dict[str, Any]]:
    """As the first lines of its docstring give them, where pybind11 puts one for each overload; none are anything."""
    lines = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> (.*)$", inspect.getdoc(what) or "", re.MULTILINE)
    return [{"takes": parameters(takes), "gives": short(gives)} for takes, gives in lines if takes != "*args, **kwargs"]


def parameters(text: str) -> list[str]:
    """Names, with = behind those that have a default; commas inside brackets part nothing."""
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

"""Finds the uses of TensorRT in source code, and checks them against the bindings' API in tests/tensorrt_api.json.

Types are inferred as far as code that uses TensorRT needs it: the module is called `tensorrt`, annotations `trt.X` give the
types of variables, parameters and `self.x`, and signatures those of calls and properties. An attribute that is tested by
`hasattr` in the same function may be missing from a version, though not from all.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())
MODULE, OF_CLASS, OF_INSTANCE = "module", "class", "instance"


@dataclass(frozen=True)
class Kind:
    """The type of an expression: the module, a class or an enum of it, or an instance of one."""

    sort: str
    name: str = ""


@dataclass(frozen=True)
class Use:
    """An attribute of TensorRT in source code; `where` is its node, `call` the node of its call."""

    owner: Kind
    attribute: str
    guarded: bool
    where: ast.Attribute
    call: ast.Call | None

    def __str__(self) -> str:
        return f"line {self.where.lineno}: {self.owner.name or 'tensorrt'}.{self.attribute}"


def complaints(source: str) -> list[str]:
    """The uses that a version lacks, and the calls with arguments that none of its overloads takes, a line each."""
    lines = []
    for version, api in API.items():
        for use in uses(source, api):
            found = member(api, use.owner, use.attribute)
            if found is None and not use.guarded:
                lines.append(f"{use} is not in {version}")
            elif found is not None and use.call is not None and not callable_with(found, use):
                lines.append(f"{use} is called in a way that {version} does not support")
    guarded = {(use.owner, use.attribute) for api in API.values() for use in uses(source, api) if use.guarded}
    lines += [
        f"{o.name}.{name} is in no version" for o, name in guarded if not any(member(a, o, name) for a in API.values())
    ]
    return lines


def uses(source: str, api: Mapping[str, Any]) -> list[Use]:
    tree = ast.parse(source)
    attributes: dict[str, Kind] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute) and annotated(node.annotation):
            attributes[node.target.attr] = annotated(node.annotation)
    found: dict[ast.Attribute, Use] = {}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for use in Reader(api, attributes, function).read():
            found.setdefault(use.where, use)
    return list(found.values())


def annotated(annotation: ast.expr | None) -> Kind | None:
    if (
        isinstance(annotation, ast.Attribute)
        and isinstance(annotation.value, ast.Name)
        and annotation.value.id == "trt"
    ):
        return Kind(OF_INSTANCE, annotation.attr)
    return None


class Reader:
    """Infers types in one function."""

    def __init__(self, api: Mapping[str, Any], attributes: Mapping[str, Kind], function: ast.FunctionDef) -> None:
        self.api, self.attributes, self.function = api, attributes, function
        self.known: dict[str, Kind] = {"tensorrt": Kind(MODULE)}
        for argument in (*function.args.args, *function.args.kwonlyargs):
            if kind := annotated(argument.annotation):
                self.known[argument.arg] = kind
        for node in ast.walk(function):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and annotated(node.annotation):
                self.known[node.target.id] = annotated(node.annotation)
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and (kind := self.kind(node.value))
            ):
                self.known.setdefault(node.targets[0].id, kind)

    def read(self) -> Iterator[Use]:
        nodes = list(ast.walk(self.function))
        calls = {node.func: node for node in nodes if isinstance(node, ast.Call)}
        tested = {n.args[1].value for n in calls.values() if isinstance(n.func, ast.Name) and n.func.id == "hasattr"}
        for node in nodes:
            if isinstance(node, ast.Attribute) and (owner := self.kind(node.value)):
                yield Use(owner, node.attr, node.attr in tested, node, calls.get(node))

    def kind(self, node: ast.expr) -> Kind | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return Kind(MODULE) if node.attr == "_tensorrt" else self.attributes.get(node.attr)
            owner = self.kind(node.value)
            found = member(self.api, owner, node.attr) if owner else None
            if found is None:
                return None
            if "property" in found:
                return instance(self.api, found["property"])
            if "enum" in found or "members" in found:
                return Kind(OF_CLASS, node.attr if owner.sort == MODULE else f"{owner.name}.{node.attr}")
            return None
        if isinstance(node, ast.Call):
            called = self.kind(node.func)
            if called and called.sort == OF_CLASS:
                return Kind(OF_INSTANCE, called.name)
            if isinstance(node.func, ast.Attribute) and (owner := self.kind(node.func.value)):
                found = member(self.api, owner, node.func.attr) or {}
                gives = {signature["gives"] for signature in found.get("signatures", [])}
                return instance(self.api, gives.pop()) if len(gives) == 1 else None
        return None


def instance(api: Mapping[str, Any], name: str | None) -> Kind | None:
    return Kind(OF_INSTANCE, name) if name and lookup(api, name) else None


def lookup(api: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A class by its name; signatures may put an I before it."""
    first, *rest = name.split(".")
    found = api.get(first) or api.get(first.removeprefix("I"))
    for part in rest:
        found = ((found or {}).get("members") or {}).get(part)
    return found


def member(api: Mapping[str, Any], owner: Kind, name: str) -> Mapping[str, Any] | None:
    if owner.sort == MODULE:
        return api.get(name)
    cls = lookup(api, owner.name)
    if cls is None:
        return None
    if "enum" in cls:
        return {"value": name} if name in cls["enum"] else None
    for base in (cls, *(api.get(base, {}) for base in cls.get("bases", ()))):
        if name in base.get("members", {}):
            return base["members"][name]
    return {"signatures": []} if name == "__init__" else None


def callable_with(found: Mapping[str, Any], use: Use) -> bool:
    """Whether an overload takes these arguments; where no signature is known, any are taken."""
    if "members" in found:
        found = found["members"].get("__init__", {"signatures": []})
    signatures = found.get("signatures")
    if signatures is None:
        return False
    bound = use.owner.sort == OF_INSTANCE or use.owner.sort == MODULE
    return not signatures or any(takes(s["takes"], use.call, bound) for s in signatures)


def takes(parameters: list[str], call: ast.Call, bound: bool) -> bool:
    names = [p for p in parameters if not (bound and p == "self")]
    given = len(call.args)
    if given > len(names) or any(isinstance(a, ast.Starred) for a in call.args):
        return False
    named = {k.arg for k in call.keywords}
    left = names[given:]
    return named <= {p.rstrip("=") for p in left} and all(p.endswith("=") or p in named for p in left)

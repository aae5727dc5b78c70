"""Sources through `open_source`: which images are listed, with which names, in which order, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli.errors import UsageError
from capcli.options import SourceOptions
from capcli.records import Failure
from capcli.sources import Source, open_source
from capcli.sources.patterns import Pattern


def touch_files(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def source(*sources: object, warnings: list[str] | None = None, **options: object) -> Source:
    warn = ([] if warnings is None else warnings).append
    return open_source(SourceOptions(tuple(map(str, sources)), **options), warn)  # type: ignore[arg-type]


def names(*sources: object, **options: object) -> list[str]:
    return [entry.name for entry in source(*sources, **options)]


def test_a_folder_alone_gives_names_relative_to_it(tmp_path: Path) -> None:
    touch_files(tmp_path, "b.jpg", "a/y.PNG", "a/x.webp", "a.txt", "c.HEIC")
    listed = source(tmp_path)
    assert listed.root == os.path.realpath(tmp_path)
    assert not listed.streaming
    assert listed.describe() == str(tmp_path)
    assert [entry.name for entry in listed] == ["a/x.webp", "a/y.PNG", "b.jpg", "c.HEIC"]
    assert all(os.path.samefile(entry.path, tmp_path / entry.name) for entry in listed)  # a second walk, too


def test_several_sources_keep_their_paths_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch_files(tmp_path, "z/1.jpg", "a/2.jpg", "notes.dat")
    monkeypatch.chdir(tmp_path)
    listed = source("z", "notes.dat", "a/")
    assert [entry.name for entry in listed] == ["z/1.jpg", "notes.dat", "a/2.jpg"]
    assert listed.root is None
    assert listed.describe() == "z, notes.dat, a/"


@settings(deadline=None)
@given(
    st.sets(
        st.lists(st.sampled_from(["a", "a-b", "a.b", "B", "é", "\udcff", "￿"]), min_size=1, max_size=3).map(tuple),
        min_size=1,
    )
)
def test_the_walk_is_in_byte_order_of_whole_names(
    tmp_path_factory: pytest.TempPathFactory, parts: set[tuple[str, ...]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    wanted = ["/".join(each) + ".jpg" for each in parts]
    touch_files(root, *wanted)
    assert names(root) == sorted(wanted, key=os.fsencode)


def test_names_may_have_any_bytes(tmp_path: Path) -> None:
    odd = [b" .jpg", b"a\nb.jpg", b"a\r.jpg", b'it\'s "q",.jpg', b"\xff\xfe.jpg", "\u2028ü.jpg".encode()]
    for name in odd:
        (tmp_path / os.fsdecode(name)).touch()
    assert [os.fsencode(name) for name in names(tmp_path)] == sorted(odd)


def test_hidden_names_are_listed_only_if_a_pattern_has_the_dot(tmp_path: Path) -> None:
    touch_files(tmp_path, "a.jpg", ".b.jpg", ".h/c.jpg", ".h/d/e.jpg", "f/._g.jpg")
    assert names(tmp_path) == ["a.jpg"]
    assert names(tmp_path, include=("*.jpg",)) == ["a.jpg"]
    assert names(tmp_path, include=(".*.jpg",)) == [".b.jpg", "f/._g.jpg"]
    assert names(tmp_path, include=(".h/**",)) == [".h/c.jpg", ".h/d/e.jpg"]
    assert names(tmp_path / ".h") == ["c.jpg", "d/e.jpg"]
    assert len(names(tmp_path / ".b.jpg")) == 1


def test_include_decides_alone_and_exclude_prunes(tmp_path: Path) -> None:
    touch_files(tmp_path, "a.jpg", "b.pdf", "raw/c.jpg", "raw/deep/d.jpg", "thumbs/e.jpg", "raw/thumbs/f.jpg")
    assert names(tmp_path, include=("*.pdf", "raw/*.jpg")) == ["b.pdf", "raw/c.jpg"]
    assert names(tmp_path, include=("raw/**/*.jpg",)) == ["raw/c.jpg", "raw/deep/d.jpg", "raw/thumbs/f.jpg"]
    assert names(tmp_path, exclude=("thumbs",)) == ["a.jpg", "raw/c.jpg", "raw/deep/d.jpg"]
    assert names(tmp_path, exclude=("thumbs/", "[ab].*")) == ["raw/c.jpg", "raw/deep/d.jpg"]
    assert names(tmp_path, exclude=("raw/**",)) == ["a.jpg", "thumbs/e.jpg"]
    assert names(tmp_path, include=("*.jpg",), exclude=("raw/*/*",)) == ["a.jpg", "raw/c.jpg", "thumbs/e.jpg"]
    assert names(tmp_path, recursive=False) == ["a.jpg"]


def test_an_excluded_folder_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch_files(tmp_path, "keep/a.jpg", "skip/b.jpg")
    opened: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(str(path)) or scandir(path))
    assert names(tmp_path, exclude=("skip",)) == ["keep/a.jpg"]
    assert not any("skip" in path for path in opened)


def test_a_glob_gives_the_paths_as_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch_files(tmp_path, "p/a.jpg", "p/q/b.jpg", "p/q/r/c.jpg", "p/.h/d.jpg", "p/q/n.pdf", "e.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("p/*.jpg") == ["p/a.jpg"]
    assert names("**/*.jpg") == ["e.jpg", "p/a.jpg", "p/q/b.jpg", "p/q/r/c.jpg"]
    assert names("p/**") == ["p/a.jpg", "p/q/b.jpg", "p/q/r/c.jpg"]
    assert names("p/*/?.*") == ["p/q/b.jpg"]
    assert names("p/.h/*") == ["p/.h/d.jpg"]
    assert names("p/**", include=("*.pdf",)) == ["p/q/n.pdf"]
    assert names("p/**", exclude=("q",)) == ["p/a.jpg"]
    assert names(tmp_path / "p/[a]*") == [f"{tmp_path}/p/a.jpg"]
    assert source("p/*.jpg").root is None


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch_files(tmp_path, "a[1].jpg", "a1.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("a[1].jpg") == ["a[1].jpg"]


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "ab", False),
        ("**/**/b", "b", True),
        ("*", "a/b", False),
        ("a*", "a\nb", True),
        ("[!a]", "b", True),
        ("[!a]", "a", False),
        ("?", ".", False),
        ("[.]a", ".a", False),
        (".a", ".a", True),
        ("**/b", ".h/b", False),
        ("./a//b", "a/b", True),
        ("A", "a", False),
    ],
)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert Pattern.anchored(pattern).matches(name) is hit


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch_files(tmp_path, "in/a.jpg", "out/b.jpg")
    (tmp_path / "in" / "loop").symlink_to("..")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
    warnings: list[str] = []
    assert [entry.name for entry in source(tmp_path / "in", warnings=warnings)] == [
        "a.jpg",
        "gone.jpg",
        "loop/out/b.jpg",
        "other/b.jpg",
        "self.jpg",
    ]
    assert len(warnings) == 1
    assert "loop/in" in warnings[0]


def test_a_pipe_is_listed_and_becomes_a_failure(tmp_path: Path) -> None:
    touch_files(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert names(tmp_path) == ["a.jpg", "b.jpg"]
    assert names(tmp_path / "*.jpg") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]


def test_a_folder_that_cannot_be_listed_is_an_entry_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch_files(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    scandir = os.scandir

    def failing(path: str) -> object:
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    walk = iter(source(tmp_path))
    assert next(walk).name == "a/1.jpg"
    (tmp_path / "c" / "3.jpg").unlink()
    (tmp_path / "c").rmdir()
    assert [(entry.name, entry.failure) for entry in walk] == [
        (name, Failure(name, "unlisted", f"the folder cannot be listed: {reason}"))
        for name, reason in (("b/", "Permission denied"), ("c/", "No such file or directory"))
    ]


def test_a_large_tree_is_listed_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(60):
        (tmp_path / f"{folder:03}").mkdir()
        for image in range(100):
            os.close(os.open(tmp_path / f"{folder:03}" / f"a rather long name for an image {image:03}.jpg", os.O_CREAT))
    opened: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    listed = source(tmp_path)
    opened.clear()
    tracemalloc.start()
    first = list(islice(listed, 1))
    assert first[0].name.startswith("000/")
    assert len(opened) == 2
    opened.clear()
    assert sum(1 for _ in listed) == 6000
    assert tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()


def test_a_list_yields_all_its_paths(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbfb.jpg\r\n\nno such.tif\n/x/\xff y.pdf\na.jpg")
    listed = source(from_file=str(listing))
    expected = ["b.jpg", "no such.tif", os.fsdecode(b"/x/\xff y.pdf"), "a.jpg"]
    assert [entry.name for entry in listed] == expected
    assert [entry.path for entry in listed] == expected
    assert listed.describe() == f"list {listing}"
    assert not listed.streaming


@pytest.mark.parametrize(
    "content",
    ["\ufeffä.jpg\nb.jpg\n".encode("utf-16-le"), "ä.jpg\r\nb.jpg".encode("utf-16"), "ä.jpg\rb.jpg\r".encode()],
)
def test_a_list_as_other_systems_write_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert names(from_file=str(tmp_path / "list.txt")) == ["ä.jpg", "b.jpg"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = f"open({str(pipe)!r}, 'wb').write(open({str(tmp_path / 'list.txt')!r}, 'rb').read())"
    writer = subprocess.Popen([sys.executable, "-c", script])
    assert names(from_file=str(pipe)) == ["ä.jpg", "b.jpg"]
    assert writer.wait() == 0


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1).filter(lambda name: b"\0" not in name)))
def test_a_list_separated_by_nul_may_have_any_name(tmp_path_factory: pytest.TempPathFactory, raw: list[bytes]) -> None:
    listing = tmp_path_factory.mktemp("list") / "list"
    listing.write_bytes(b"\0".join([b"first", *raw]))
    assert [os.fsencode(name) for name in names(from_file=str(listing), null=True)] == [b"first", *raw]


def test_a_list_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('a.jpg\\nb.jpg\\n')"])
    listed = source(from_file=str(pipe))
    assert listed.streaming
    assert [entry.name for entry in listed] == ["a.jpg", "b.jpg"]
    assert writer.wait() == 0


LIST_STDIN = """
import sys
from capcli.options import SourceOptions
from capcli.sources import open_source
for entry in open_source(SourceOptions(("-",), null=len(sys.argv) > 1), print):
    print(ascii(entry.name), flush=True)
"""


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_standard_input_is_yielded_as_it_arrives(separator: bytes) -> None:
    command = [sys.executable, "-c", LIST_STDIN, *(["null"] if separator == b"\0" else [])]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdin
    assert child.stdout
    for sent, output in [
        (b"a" + separator, b"'a'\n"),
        (b"b c" + separator + separator + b"d", b"'b c'\n"),
        (b"\xe9" + separator, b"'d\\udce9'\n"),
    ]:
        child.stdin.write(sent)
        assert child.stdout.readline() == output  # waits for ever if names are buffered
    child.stdin.write(b"last")
    child.stdin.close()
    assert child.stdout.read() == b"'last'\n"
    assert child.wait() == 0
    child.stdout.close()


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ((), {}, "no source"),
        (("gone",), {}, "gone: no such file or folder"),
        (("*.jpg",), {}, r"\*.jpg: no file with an image suffix matches"),
        (("*.jpg",), {"include": ("*",)}, r"\*.jpg: no file matches"),
        (("gone/*.jpg",), {}, "no file with an image suffix matches"),
        ((), {"from_file": "gone"}, "cannot read the list gone: No such file"),
        ((), {"from_file": "."}, "is a folder: give it as a SOURCE"),
        (("-",), {"from_file": "-"}, "given twice"),
        ((".",), {"null": True}, "there is no list"),
        (("some.dat",), {"exclude": ("x",)}, "no SOURCE is one"),
        ((), {"from_file": "some.dat"}, "contains NUL bytes"),
        (("bad\0name",), {}, "no such file"),
    ],
)
def test_wrong_usage_is_an_error_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: tuple[str, ...],
    options: dict[str, object],
    message: str,
) -> None:
    (tmp_path / "some.dat").write_bytes(b"a.jpg\0b.jpg\0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        source(*sources, **options)


EMPTY_FOLDERS: list[tuple[list[str], dict[str, object], str]] = [
    ([], {}, "0 images, and no other file"),
    ([".hidden.jpg", ".git/a.jpg"], {}, "0 images, and no other file"),
    (
        ["1.CR2", "x/2.CR2", "3.tar", "LICENSE", "a.sentence like this one"],
        {},
        "0 images; 2 .CR2, 2 without suffix, 1 .tar: name them with --include",
    ),
    ([f"{n}.{'abcdefg'[n]}" for n in range(7)], {}, "1 .e, 2 others: name them with --include"),
    (["1.jpg", "2.PNG", "3.nef"], {"exclude": ("*.*",)}, "0 images; --exclude leaves out 2 images; 1 .nef: name them"),
    (["1.jpg", "2.jpg"], {"include": ("*.png",)}, "--include *.png takes none of 2 files: 2 .jpg"),
    (["x/1.jpg"], {"recursive": False}, "0 images, and no other file; its subfolders are not searched"),
]


@pytest.mark.parametrize(("files", "options", "message"), EMPTY_FOLDERS)
def test_a_folder_without_images_is_an_error_that_says_what_is_in_it(
    files: list[str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    touch_files(tmp_path, *files)
    with pytest.raises(UsageError) as caught:
        source(tmp_path, **options)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert message in str(caught.value)


def test_a_pattern_without_images_says_what_it_matches(tmp_path: Path) -> None:
    touch_files(tmp_path, "a.CR2", "b.CR2", "c.jpg")
    with pytest.raises(UsageError, match=r"no file with an image suffix matches: 0 images; 2 \.CR2: name them with"):
        source(tmp_path / "*.CR2")
    with pytest.raises(UsageError, match=r"no file matches: --include \*.png takes none of 3 files: 2 .CR2, 1 .jpg"):
        source(tmp_path / "*", include=("*.png",))


def test_one_folder_without_images_among_other_sources_is_a_warning(tmp_path: Path) -> None:
    touch_files(tmp_path, "empty/a.txt", "full/b.jpg")
    warnings: list[str] = []
    assert len(list(source(tmp_path / "empty", tmp_path / "full", warnings=warnings))) == 1
    assert warnings == [f"{tmp_path}/empty: 0 images; 1 .txt: name them with --include"]
    with pytest.raises(UsageError, match=r"empty: 0 images.*; .*empty/: 0 images"):
        source(tmp_path / "empty", f"{tmp_path}/empty/")


def test_an_empty_list_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "list").touch()
    assert names(from_file=str(tmp_path / "list")) == []


def test_standard_input_is_described_and_streams() -> None:
    listed = source("-")
    assert listed.streaming
    assert listed.root is None
    assert listed.describe() == "standard input"

"""The loader of Omniglot on small data sets in the official layout, written here with Pillow and zipfile.

Oracles: Pillow for what an image is, a local web server for what a download does. The tests at the end read the real
data from the folder named by the environment variable BILEVEL_OMNIGLOT.
"""

import dataclasses
import hashlib
import http.server
import io
import os
import shutil
import stat
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from applications.meta_learning.data import DataError, alphabet_split, load_omniglot, random_split
from applications.meta_learning.data.layout import OFFICIAL, ImageSet, Layout

PIXELS = 25
BACKGROUND, EVALUATION = "images_background", "images_evaluation"
LAYOUT = Layout(
    sets=(
        ImageSet(
            name=BACKGROUND, group="background", alphabets=2, characters=3, url="http://127.0.0.1:9/b", md5="0" * 32
        ),
        ImageSet(
            name=EVALUATION, group="evaluation", alphabets=1, characters=2, url="http://127.0.0.1:9/e", md5="0" * 32
        ),
    ),
    drawings=4,
    image_size=PIXELS,
)
CHARACTERS = [  # in the order in which they must come
    f"{BACKGROUND}/Greek/character01",
    f"{BACKGROUND}/Greek/character02",
    f"{BACKGROUND}/N_Ko/character01",
    f"{EVALUATION}/Angelic/character01",
    f"{EVALUATION}/Angelic/character02",
]


def png(name, pixels=PIXELS, inverted=False):
    """A 1-bit drawing, dark on light, that depends on the name."""
    random = np.random.default_rng(list(name.encode()))
    image = Image.new("1", (pixels, pixels), 0 if inverted else 1)
    points = random.integers(2, pixels - 2, size=(4, 2)).tolist()
    ImageDraw.Draw(image).line([tuple(p) for p in points], fill=1 if inverted else 0, width=2)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def small_set():
    return {
        f"{character}/{1 + i:04d}_{drawing:02d}.png": png(f"{character} {drawing}")
        for i, character in enumerate(CHARACTERS)
        for drawing in range(1, LAYOUT.drawings + 1)
    }


def write_archives(folder, files, extra=()):
    """Both archives, one of them compressed. Members are not in order, as nothing says that they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, compression in ((BACKGROUND, zipfile.ZIP_DEFLATED), (EVALUATION, zipfile.ZIP_STORED)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w", compression) as archive:
            for member, content in reversed([(k, v) for k, v in files.items() if k.startswith(name)]):
                archive.writestr(member, content)
            for member, content in extra if name == BACKGROUND else ():
                archive.writestr(member, content)
    return folder


def write_folders(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


WRITERS = pytest.mark.parametrize("write", [write_archives, write_folders])


@pytest.fixture
def place(tmp_path):
    """Where the data are, beside nothing else."""
    folder = tmp_path / "place" / "data"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def load(place, tmp_path):
    def call(data_dir=place, cache_dir=tmp_path / "cache", size=PIXELS, layout=LAYOUT, download=False):
        return load_omniglot(data_dir, cache_dir, size, download, layout=layout)

    return call


@pytest.fixture
def no_decoding(monkeypatch):
    """Call it, and whatever decodes an image from then on fails."""

    def fail(*args, **options):
        raise AssertionError("decoded an image although a cache was there")

    return lambda: monkeypatch.setattr(Image, "open", fail)


def ink(content, size=PIXELS, resample=Image.Resampling.LANCZOS):
    with Image.open(io.BytesIO(content)) as image:
        return 255 - np.asarray(image.convert("L").resize((size, size), resample)).astype(int)


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and (a.names, a.groups, a.source_key) == (b.names, b.groups, b.source_key)
        and a.images.dtype == b.images.dtype
    )


# --- what is loaded --------------------------------------------------------------------------------------------------


@WRITERS
def test_images_are_what_pillow_reads(write, place, load):
    files = small_set()
    write(place, files)
    loaded = load()
    assert loaded.names == tuple(CHARACTERS)
    assert loaded.groups == ("background",) * 3 + ("evaluation",) * 2
    assert loaded.images.dtype == torch.uint8 and loaded.images.shape == (5, 4, PIXELS, PIXELS)
    ordered = iter(files.values())
    for character in loaded.images.numpy():
        for drawing in character:
            np.testing.assert_array_equal(drawing, ink(next(ordered)))
    assert loaded.images.flatten(2).amax(-1).eq(255).all()  # ink is 255
    assert loaded.images[:, :, 0, 0].eq(0).all()  # the ground is 0


@WRITERS
def test_smaller_images_are_resized_by_lanczos(write, place, load):
    files = small_set()
    write(place, files)
    images = load(size=9).images.flatten(0, 1).numpy().astype(int)
    lanczos = np.stack([ink(content, 9) for content in files.values()])
    box = np.stack([ink(content, 9, Image.Resampling.BOX) for content in files.values()])
    assert np.abs(images - lanczos).max() <= 1  # inverted before or after: one rounding
    assert np.abs(images - box).max() > 10


def test_the_container_makes_no_difference(tmp_path, load):
    files = small_set()
    archives, folders = write_archives(tmp_path / "a", files), write_folders(tmp_path / "f", files)
    mixed = write_folders(tmp_path / "m", {k: v for k, v in files.items() if k.startswith(EVALUATION)})
    shutil.copy(archives / f"{BACKGROUND}.zip", mixed)
    loaded = [load(data_dir=folder) for folder in (archives, folders, mixed, str(archives))]
    assert all(same(loaded[0], other) for other in loaded[1:])


@WRITERS
def test_other_drawings_have_another_source_key(write, tmp_path, load):
    files = small_set()
    first = load(data_dir=write(tmp_path / "a", files))
    files[f"{CHARACTERS[4]}/0005_04.png"] = png("something else")
    assert load(data_dir=write(tmp_path / "b", files)).source_key != first.source_key


@WRITERS
def test_what_a_desktop_leaves_behind_is_ignored(write, tmp_path, load):
    files = small_set()
    clean = load(data_dir=write(tmp_path / "a", files))
    litter = {
        f"{BACKGROUND}/.DS_Store": b"x",
        f"{BACKGROUND}/Greek/character01/._0001_01.png": b"x",
        f"{BACKGROUND}/Greek/character01/Thumbs.db": b"x",
        f"{BACKGROUND}/README.txt": b"x" * 2_000_000,
    }
    assert same(load(data_dir=write(tmp_path / "b", litter | files)), clean)
    mac = [(f"__MACOSX/{BACKGROUND}/Greek/character01/._0001_01.png", b"x"), (f"{BACKGROUND}/", b"")]
    assert same(load(data_dir=write_archives(tmp_path / "c", files, extra=mac)), clean)


@pytest.mark.parametrize("size", [3, PIXELS + 1, 9.0, True])
def test_wrong_sizes_are_refused(load, size):
    with pytest.raises(ValueError, match=f"size: expected an integer from 4 to {PIXELS}, got {size}"):
        load(size=size)


# --- the cache -------------------------------------------------------------------------------------------------------


@WRITERS
def test_images_are_decoded_once(write, place, load, no_decoding):
    write(place, small_set())
    first = load(size=9)
    no_decoding()
    assert same(load(size=9), first)


@WRITERS
def test_a_moved_source_keeps_its_cache(write, place, tmp_path, load, no_decoding):
    write(place, small_set())
    first = load()
    place.rename(tmp_path / "elsewhere")
    no_decoding()
    if write is write_folders:  # renaming the parent changes neither the times nor the sizes of the files
        assert same(load(data_dir=tmp_path / "elsewhere"), first)
    else:
        shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")
        assert same(load(data_dir=tmp_path / "copy"), first)


def test_each_size_has_its_own_cache(place, load):
    write_archives(place, small_set())
    assert [load(size=size).images.shape[-1] for size in (9, 10, 9, 10)] == [9, 10, 9, 10]


@WRITERS
def test_a_changed_source_is_decoded_again(write, place, load):
    """Also where name, size and modification time of every file stay as they were."""
    files = small_set()
    write(place, files)
    first = load()
    times = {path: os.stat(path) for path in place.rglob("*") if path.is_file()}
    victim = f"{CHARACTERS[3]}/0004_01.png"  # in the archive that is not compressed: equal sizes stay equal
    other = next(
        candidate
        for candidate in (png(f"other {i}") for i in range(10_000))
        if len(candidate) == len(files[victim]) and candidate != files[victim]
    )
    write(place, files | {victim: other})
    for path, about in times.items():
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert path.stat().st_size == about.st_size
    second = load()
    np.testing.assert_array_equal(second.images[3, 0].numpy(), ink(other))
    assert second.source_key != first.source_key


def the_cache(folder):
    (path,) = folder.iterdir()  # and no temporary file beside it
    return path


def damaged(content):
    yield "empty", b""
    for share in (0.01, 0.3, 0.6, 0.99):
        yield f"cut at {share}", content[: int(share * len(content))]
    yield "zeros inside", content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    yield "one bit", bytes(flipped)
    yield "another file", b"hello, I am not a cache" * 100


def test_a_damaged_cache_is_built_again(place, tmp_path, load, no_decoding):
    write_archives(place, small_set())
    first = load()
    path = the_cache(tmp_path / "cache")
    content = path.read_bytes()
    for _, bad in damaged(content):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match=r"omniglot-25-.*npz: not a usable cache \(.*\); decoding again"):
            assert same(load(), first)
        assert the_cache(tmp_path / "cache") == path
    no_decoding()
    assert same(load(), first)


def test_a_cache_that_holds_code_is_not_run(place, tmp_path, load):
    write_archives(place, small_set())
    first = load()
    path = the_cache(tmp_path / "cache")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["names"] = np.array([TouchWhenUnpickled(tmp_path / "was-run")] * 5, dtype=object)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.warns(UserWarning, match="not a usable cache"):
        assert same(load(), first)
    assert not (tmp_path / "was-run").exists()


class TouchWhenUnpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_cache_of_other_data_under_this_name_is_not_used(place, tmp_path, load):
    write_archives(place, small_set())
    load(cache_dir=tmp_path / "one")
    write_archives(place, small_set() | {f"{CHARACTERS[0]}/0001_01.png": png("something else")})
    second = load(cache_dir=tmp_path / "two")
    shutil.copy(the_cache(tmp_path / "one"), the_cache(tmp_path / "two"))
    with pytest.warns(UserWarning, match=r"not a usable cache \(expected the key"):
        assert same(load(cache_dir=tmp_path / "two"), second)


@pytest.mark.parametrize("where", ["numpy.savez", "os.replace"])
def test_an_interruption_leaves_no_half_cache(where, place, tmp_path, load, monkeypatch):
    write_archives(place, small_set())

    def interrupt(file, *args, **arrays):
        if where == "numpy.savez":
            file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert list((tmp_path / "cache").iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load().num_classes == 5


def test_a_cache_folder_that_cannot_be_written_is_a_warning(place, tmp_path, load):
    write_archives(place, small_set())
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match=r"could not be written .* going on without a cache.*cache_dir"):
        loaded = load(cache_dir=tmp_path / "file" / "cache")
    assert same(loaded, load())


# --- what is wrong is said -------------------------------------------------------------------------------------------


def without(*names):
    return lambda files: {k: v for k, v in files.items() if not k.startswith(names)}


def replaced(name, content):
    return lambda files: files | {name: content}


G1 = f"{BACKGROUND}/Greek/character01"
WRONG = [
    (without(f"{BACKGROUND}/N_Ko"), BACKGROUND, "expected 3 characters of 2 alphabets, found 2 of 1"),
    (without(f"{EVALUATION}/Angelic/character02"), EVALUATION, "expected 2 characters of 1 alphabets, found 1 of 1"),
    (replaced(f"{BACKGROUND}/New/character01/0009_01.png", b""), BACKGROUND, r"drawings 1 to 4 .* missing \[2, 3, 4\]"),
    (without(f"{G1}/0001_03"), BACKGROUND, rf"the drawings 1 to 4 of {G1}, missing \[3\], not expected none"),
    (replaced(f"{G1}/0001_05.png", b""), BACKGROUND, rf"1 to 4 of {G1}, missing none, not expected \[5\]"),
    (replaced(f"{G1}/0002_04.png", b""), BACKGROUND, rf"drawing 4 of {G1} is there twice \('{G1}/0002_04.png'\)"),
    (replaced(f"{G1}/copy.png", b""), BACKGROUND, rf"files named {BACKGROUND}/<Alphabet>/\S+, found '{G1}/copy.png'"),
    (replaced(f"{G1}/0001_02.png", b"GIF89a"), BACKGROUND, rf"{G1}/0001_02.png is not a drawing \(cannot identify"),
    (replaced(f"{G1}/0001_02.png", png("x")[:60]), BACKGROUND, rf"{G1}/0001_02.png is not a drawing"),
    (
        replaced(f"{G1}/0001_02.png", png("x", 9)),
        BACKGROUND,
        r"0001_02.png is not a drawing \(expected 25 x 25 pixels, found 9 x 9",
    ),
]


@WRITERS
@pytest.mark.parametrize(("change", "where", "message"), WRONG)
def test_wrong_contents_are_named(write, change, where, message, place, tmp_path, load):
    write(place, change(small_set()))
    with pytest.raises(DataError, match=message) as error:
        load()
    suffix, remedy = (".zip", "download the official") if write is write_archives else ("", "unpack the official")
    assert str(error.value).startswith(f"{place / where}{suffix}: ")
    assert remedy in str(error.value)
    assert not (tmp_path / "cache").exists()


@WRITERS
def test_light_ink_on_a_dark_ground_is_refused(write, place, load):
    write(place, {name: png(name, inverted=name.startswith(EVALUATION)) for name in small_set()})
    with pytest.raises(DataError, match=rf"{EVALUATION}\S*: expected dark ink on a light ground, found the opposite"):
        load()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
def test_a_truncated_archive_is_refused(share, place, load):
    write_archives(place, small_set())
    path = place / f"{EVALUATION}.zip"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"{EVALUATION}.zip: not a complete zip archive, .* download the official"):
        load()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_are_refused_or_harmless(data, place, load):
    """Bytes changed at random: the images come out as they were, or the error is ours."""
    files = small_set()
    write_archives(place, files)
    path = place / f"{BACKGROUND}.zip"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of them in the directory at the end, which is the smaller part.
        first = data.draw(st.sampled_from([0, len(content) - 1200]))
        content[data.draw(st.integers(first, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load(cache_dir=place / "file" / "none")
        except DataError:
            return
    expected = np.stack([ink(content) for content in files.values()])
    np.testing.assert_array_equal(loaded.images.flatten(0, 1).numpy(), expected)


UNSAFE = [
    ("../outside.png", "points outside the archive"),
    (f"{BACKGROUND}/../../outside.png", "points outside the archive"),
    (f"{BACKGROUND}\\..\\..\\outside.png", "points outside the archive"),
    ("/outside.png", "has an absolute path"),
    ("\\\\server\\outside.png", "has an absolute path"),
    ("C:\\outside.png", "has an absolute path"),
]


@pytest.mark.parametrize(("member", "reason"), UNSAFE)
def test_members_that_point_outside_are_refused_by_name(member, reason, place, load):
    write_archives(place, small_set(), extra=[(member, png("x"))])
    with pytest.raises(DataError) as error:
        load()
    assert f"refused, its member {member!r} {reason}" in str(error.value)
    assert sorted(path.name for path in place.parent.rglob("*")) == ["data", f"{BACKGROUND}.zip", f"{EVALUATION}.zip"]


def test_symbolic_links_and_bombs_are_refused_by_name(place, load):
    link = zipfile.ZipInfo(f"{BACKGROUND}/Greek/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_archives(place, small_set(), extra=[(link, "/etc/passwd")])
    with pytest.raises(DataError, match="member 'images_background/Greek/link' is a symbolic link"):
        load()
    write_archives(place, small_set(), extra=[(f"{G1}/0001_09.png", bytes(2_000_000))])
    with pytest.raises(DataError, match=r"0001_09.png' has 2000000 bytes, more than any drawing"):
        load()


def test_missing_data_say_where_they_may_be(place, load):
    asks = r"no Omniglot in {}: expected images_background.zip or the folder .*data_dir \(--data-dir\).*--download"
    with pytest.raises(DataError, match=asks.format(place)):
        load()
    with pytest.raises(DataError, match=asks.format(place / "nowhere")):
        load(data_dir=place / "nowhere")
    write_archives(place, small_set())
    for wrong in (place.parent, place / f"{BACKGROUND}.zip", place / "nowhere"):
        with pytest.raises(DataError, match=rf"no Omniglot in {wrong}: .* It is in {place}\. Name the folder"):
            load(data_dir=wrong)


def test_small_sets_do_not_pass_for_omniglot(place, load):
    write_archives(place, {k: v for k, v in small_set().items() if k.endswith(("01.png", "02.png"))})
    with pytest.raises(DataError, match=r"expected the drawings 1 to 20"):
        load(layout=OFFICIAL)
    with pytest.raises(DataError, match=r"expected 964 characters of 30 alphabets, found 3 of 2"):
        load(layout=dataclasses.replace(OFFICIAL, drawings=2))


# --- the download ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: `.pages` is what it has (path -> bytes), `.asked` what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            content = self.server.pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"") + self.server.missing))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.asked, server.missing = {}, [], 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(server, tmp_path):
    """The layout with the addresses and checksums of archives that the server has."""
    archives = write_archives(tmp_path / "online", small_set())
    sets = []
    for image_set in LAYOUT.sets:
        content = (archives / f"{image_set.name}.zip").read_bytes()
        server.pages[f"/{image_set.name}.zip"] = content
        url = f"http://127.0.0.1:{server.server_port}/{image_set.name}.zip"
        sets.append(dataclasses.replace(image_set, url=url, md5=hashlib.md5(content).hexdigest()))
    return dataclasses.replace(LAYOUT, sets=tuple(sets))


def test_a_download_is_made_once(server, online, tmp_path, load):
    target = tmp_path / "new" / "folder"
    first = load(data_dir=target, layout=online, download=True)
    assert sorted(server.asked) == [f"/{BACKGROUND}.zip", f"/{EVALUATION}.zip"]
    assert sorted(path.name for path in target.iterdir()) == [f"{BACKGROUND}.zip", f"{EVALUATION}.zip"]
    assert same(load(data_dir=target, layout=online, download=True), first)
    assert same(load(data_dir=target, layout=online), first)
    assert len(server.asked) == 2


def test_without_a_folder_the_user_cache_is_used(server, online, tmp_path, load, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, **options: tmp_path / "user" / name)
    with pytest.raises(DataError, match=rf"no Omniglot in {tmp_path / 'user' / 'bilevel' / 'omniglot'}"):
        load(data_dir=None, cache_dir=None, layout=online)
    first = load(data_dir=None, cache_dir=None, layout=online, download=True)
    assert same(load(data_dir=None, cache_dir=None, layout=online), first)
    files = sorted(path.name for path in (tmp_path / "user" / "bilevel" / "omniglot").iterdir())
    assert files[:2] == [f"{BACKGROUND}.zip", f"{EVALUATION}.zip"] and files[2].startswith("omniglot-25-")
    assert len(files) == 3


def test_a_download_never_overwrites(server, online, place, load):
    """An archive of the user's own is left alone, right or wrong."""
    mine = place / f"{BACKGROUND}.zip"
    mine.write_bytes(b"the only copy of something")
    with pytest.raises(DataError, match="not a complete zip archive"):
        load(layout=online, download=True)
    assert mine.read_bytes() == b"the only copy of something"
    assert server.asked == [f"/{EVALUATION}.zip"]


def test_a_download_with_a_wrong_checksum_is_thrown_away(server, online, place, load):
    server.pages[f"/{BACKGROUND}.zip"] += b"!"
    with pytest.raises(
        DataError, match=rf"{BACKGROUND}.zip is not the official archive \(expected md5 \w+\); nothing was"
    ):
        load(layout=online, download=True)
    assert list(place.iterdir()) == []


def test_a_broken_off_download_is_thrown_away(server, online, place, load):
    server.missing = 1000
    with pytest.raises(
        DataError, match=r"could not download http\S+ to .*images_background.zip: .* without a network, fetch"
    ):
        load(layout=online, download=True)
    assert list(place.iterdir()) == []


def test_a_page_that_is_gone_is_said(server, online, place, load):
    server.pages.clear()
    with pytest.raises(DataError, match=r"could not download .*404"):
        load(layout=online, download=True)
    assert list(place.iterdir()) == []


def test_without_a_network_the_message_says_what_to_do(server, online, place, load):
    closed = server.server_port
    server.shutdown()
    server.server_close()  # nobody listens at this port any more
    with pytest.raises(DataError, match=rf"127.0.0.1:{closed}/\S+ elsewhere and put it into {place}"):
        load(layout=online, download=True)
    assert list(place.iterdir()) == []


def test_a_target_that_cannot_be_written_is_said(server, online, tmp_path, load):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"could not download .* to .*images_background.zip: "):
        load(data_dir=tmp_path / "file" / "data", layout=online, download=True)


def test_the_official_archives_are_the_published_ones():
    assert [(s.name, s.characters, s.alphabets, s.md5) for s in OFFICIAL.sets] == [
        (BACKGROUND, 964, 30, "68d2efa1b9178cc56df9314c21c6e718"),
        (EVALUATION, 659, 20, "6b91aef0f799c5bb55b94e3f2daec811"),
    ]
    for image_set in OFFICIAL.sets:
        assert image_set.url == f"https://github.com/brendenlake/omniglot/raw/master/python/{image_set.name}.zip"


# --- the real data ---------------------------------------------------------------------------------------------------

needs_omniglot = pytest.mark.skipif(
    "BILEVEL_OMNIGLOT" not in os.environ, reason="BILEVEL_OMNIGLOT, the folder with the real Omniglot, is not set"
)


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    return load_omniglot(os.environ["BILEVEL_OMNIGLOT"], tmp_path_factory.mktemp("cache"))


def original(name):
    """A file of the real data, from the archive or from the folder."""
    folder = Path(os.environ["BILEVEL_OMNIGLOT"])
    archive = folder / f"{name.split('/')[0]}.zip"
    if not archive.exists():
        return (folder / name).read_bytes()
    with zipfile.ZipFile(archive) as file:
        return file.read(name)


@needs_omniglot
def test_real_counts(omniglot):
    assert omniglot.images.shape == (1623, 20, 28, 28)
    assert omniglot.groups == ("background",) * 964 + ("evaluation",) * 659
    alphabets = [
        {name.split("/")[1] for name in omniglot.names if name.startswith(part)} for part in (BACKGROUND, EVALUATION)
    ]
    assert [len(names) for names in alphabets] == [30, 20]
    assert not alphabets[0] & alphabets[1]
    assert len(set(omniglot.names)) == 1623


@needs_omniglot
@pytest.mark.parametrize(
    ("character", "number"),
    [  # numbers as in the names of the published files
        ("images_background/Arcadian/character01", 1),
        ("images_evaluation/Angelic/character01", 965),
    ],
)
def test_real_drawings_are_what_pillow_reads(omniglot, character, number):
    images = omniglot.images[omniglot.names.index(character)].numpy().astype(int)
    for drawing in range(20):
        content = original(f"{character}/{number:04d}_{drawing + 1:02d}.png")
        assert np.abs(images[drawing] - ink(content, 28)).max() <= 1
    assert 0 < images.mean() < 100  # ink is bright, and there is less ink than ground


@needs_omniglot
def test_real_splits(omniglot):
    split = random_split(omniglot, 1200, 0)
    assert (len(split.train), len(split.test)) == (1200, 423)
    split = alphabet_split(omniglot)
    assert (len(split.train), len(split.test)) == (964, 659)
    assert omniglot.names[max(split.train)].startswith(BACKGROUND)
    assert omniglot.names[min(split.test)].startswith(EVALUATION)

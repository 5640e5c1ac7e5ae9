"""Keys of seals: the derivations, secrets that nothing shows, and the key file."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import stat
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess

from geventaudit.errors import SealError
from geventaudit.trail import key_file
from geventaudit.trail.keys import MAX_NUMBERS, KeyNode, StreamName, next_start, parse_stream, root_of
from geventaudit.trail.secret import Secret, hkdf_extract

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("data").joinpath("seal_vectors.json").read_text())
KEY = bytes(range(32))


def raw(secret: Secret) -> bytes:
    return secret._bytes


# -- the primitives, by the vectors of their standards -----------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["rfc4231"], ids=lambda each: each["case"])
def test_mac_is_hmac_sha256(vector: dict[str, str]) -> None:
    secret = Secret(bytes.fromhex(vector["key"]))
    mac = secret.mac(bytes.fromhex(vector["data"]))
    assert mac.hex() == vector["hmac"]
    assert secret.verify(bytes.fromhex(vector["data"]), mac)
    assert not secret.verify(bytes.fromhex(vector["data"]), bytes(32))


@pytest.mark.parametrize("vector", VECTORS["rfc5869"], ids=lambda each: each["case"])
def test_extract_is_that_of_hkdf(vector: dict[str, Any]) -> None:
    prk = hkdf_extract(bytes.fromhex(vector["salt"]), Secret(bytes.fromhex(vector["ikm"])))
    assert raw(prk).hex() == vector["prk"]
    # derive() is the expansion, with a label before the info: the standard's, without the label, gives its vector.
    first = hmac.digest(raw(prk), bytes.fromhex(vector["info"]) + b"\x01", "sha256")
    assert vector["okm"].startswith(first.hex()[: len(vector["okm"])])
    assert raw(prk.derive(b"x")) == hmac.digest(raw(prk), b"geventaudit seal 1 x\x01", "sha256")


def test_the_mac_of_a_record_key_is_hmac_too() -> None:
    for number in range(50):
        secret = Secret(hashlib.sha256(bytes([number])).digest())
        assert secret.mac(raw(secret)[::-1]) == hmac.digest(raw(secret), raw(secret)[::-1], "sha256")


def test_the_tree_is_the_one_of_the_vector_file() -> None:
    tree = VECTORS["key_tree"]
    master = Secret(bytes.fromhex(tree["master"]))
    assert raw(next_start(master)).hex() == tree["master_of_next_start"]
    node = root_of(master, bytes.fromhex(tree["salt"]), tree["start"])
    assert raw(node._secret).hex() == tree["root"]
    found = {}
    name, first = node.take_stream()
    found[str(name)] = [raw(first.evolve_by(steps)).hex() for steps in range(3)]
    fork = node.take_process()
    name, first = fork.take_stream()
    found[str(name)] = [raw(first.evolve_by(steps)).hex() for steps in range(3)]
    name, first = node.take_stream()
    found[str(name)] = [raw(first.evolve_by(steps)).hex() for steps in range(3)]
    assert found == tree["record_keys"]


def test_keys_evolve_one_step_at_a_time_as_many_at_once() -> None:
    secret = Secret(KEY)
    assert raw(secret.evolve()) == hashlib.sha256(b"geventaudit seal 1 next\0" + KEY).digest()
    later = secret
    for _ in range(5):
        later = later.evolve()
    assert raw(secret.evolve_by(5)) == raw(later)
    assert raw(secret.evolve_by(0)) == KEY
    assert raw(secret) == KEY, "immutable"


def test_no_child_gets_the_key_of_another() -> None:
    node = root_of(Secret(KEY), bytes(16), 1)
    seen = set()
    for _ in range(5):
        fork = node.take_process()
        keys = [raw(node._secret), raw(fork._secret), raw(node.take_stream()[1]), raw(fork.take_stream()[1])]
        seen |= set(keys)
    assert len(seen) == 20
    assert node.children == 10


def test_names_of_streams() -> None:
    name = StreamName("0" * 32, 7, (1, 22))
    assert parse_stream(str(name)) == name
    longest = "/".join(["0" * 32, *["1"] * MAX_NUMBERS])
    assert parse_stream(longest) is not None
    no_names = ["", "0" * 32, "0" * 32 + "/1", "0" * 31 + "/1/1", "0" * 32 + "/1/0", "0" * 32 + "/01/1", longest + "/1"]
    for text in [*no_names, "0" * 32 + "/1/-1", "0" * 32 + "/1/1/", "A" * 32 + "/1/1", "0" * 32 + "/1/\u0661"]:
        assert parse_stream(text) is None, text


FORK_WHILE_A_KEY_IS_TAKEN = """
import os, sys
from geventaudit import Seal, SealError

kind, path = sys.argv[1:]
seal = Seal(key_file=path) if kind == "file" else Seal(key=bytes(32))
names = []
if kind != "unused key":
    if kind == "file":
        seal.read()
    names.append(seal.take_stream()[0])
with seal._locked():  # as the code that a signal handler interrupts
    child = os.fork()
try:
    if seal.needs_reading:
        seal.read()
    names.append(seal.take_stream()[0])
    os.write(1, f"{'child' if child == 0 else 'parent'} {names[-1]}\\n".encode())
except SealError as error:
    os.write(1, f"refused: {error}\\n".encode())
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize("kind", ["file", "unused key", "key"])
def test_a_fork_while_a_key_is_taken_gives_the_child_keys_of_its_own(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "seal.key"
    key_file.create(str(path))
    ran = subprocess.run(
        [sys.executable, "-c", FORK_WHILE_A_KEY_IS_TAKEN, kind, str(path)], capture_output=True, text=True, check=True
    )
    child, parent = sorted(ran.stdout.splitlines(), key=lambda line: "parent" in line)
    if kind == "key":  # the key was dropped when the first client took its own
        assert child.startswith("refused")
        assert "make a Seal of its own" in child
    else:
        streams = [line.split()[-1] for line in (child, parent)]
        salts = [stream.partition("/")[0] for stream in streams]
        assert salts[0] != salts[1]
        assert [stream.split("/")[1] for stream in streams] == (["2", "1"] if kind == "file" else ["0", "0"])
    assert parent.split()[-1].endswith("/1" if kind == "unused key" else "/2")


def test_forks_of_forks_end_where_names_end() -> None:
    node: KeyNode = root_of(Secret(KEY), bytes(16), 1)
    for _ in range(MAX_NUMBERS - 2):
        node = node.take_process()
    assert parse_stream(str(node.take_stream()[0])) is not None
    with pytest.raises(SealError, match="forked"):
        node.take_process()


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [repr, str, lambda secret: f"{secret}", "{!r}".format])
def test_a_secret_has_a_fixed_repr(use: Any) -> None:
    assert use(Secret(KEY)) == "<secret>"


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_secret_stays_where_it_is(use: Any) -> None:
    with pytest.raises(TypeError, match="secret"):
        use(Secret(KEY))


def shown_by_a_reporter(error: BaseException) -> str:
    """All local variables of all frames but the test's own, as an error reporter would show them."""
    assert error.__traceback__ is not None
    report = traceback.TracebackException(
        type(error), error, error.__traceback__.tb_next, capture_locals=True, limit=None
    )
    return "".join(report.format())


@pytest.mark.parametrize(
    "content",
    [
        b"geventaudit-seal-key 1 %b 1 more\n",
        b"geventaudit-seal-key 2 %b 1\n",
        b"geventaudit-seal-key 1 %b 1x\n",
        b"geventaudit-seal-key 1 %b\n",
        b"geventaudit-seal-key 1 %b0 1\n",
        b"geventaudit-seal-key 1 %b00 1\n",
        b"%b\nx",
        b"a b c %b",
        b"geventaudit-seal-key 1 x %b",
        b"",
    ],
)
def test_a_file_that_is_no_key_file_shows_no_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    digits = KEY.hex().encode()
    path.write_bytes(content.replace(b"%b", digits))
    path.chmod(0o600)
    for read in (key_file.take, key_file.read_copy):
        with pytest.raises(SealError) as caught:
            read(str(path))
        shown = shown_by_a_reporter(caught.value)
        assert "key_file.py" in shown
        assert digits.decode()[:16] not in shown
        assert repr(KEY)[2:20] not in shown
    assert path.read_bytes() == content.replace(b"%b", digits), "nothing was changed"


def test_the_digits_of_a_key_are_a_copy_for_start_0(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY.hex() + "\n")
    key, start = key_file.read_copy(str(path))
    assert (raw(key), start) == (KEY, 0)
    path.write_text(KEY.hex()[2:])
    with pytest.raises(SealError):
        key_file.read_copy(str(path))


# -- the key file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = str(tmp_path / "seal.key")
    key_file.create(made)
    return made


def test_each_start_reads_a_later_key(path: str) -> None:
    copy_of_auditor, start = key_file.read_copy(path)
    assert start == 1
    for number in (1, 2, 3):
        master, start = key_file.take(path)
        assert start == number
        assert raw(master) == raw(copy_of_auditor)
        assert raw(copy_of_auditor).hex() not in Path(path).read_text()
        copy_of_auditor = next_start(copy_of_auditor)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(os.path.dirname(path)) == ["seal.key"]


def test_a_key_file_is_not_overwritten(path: str) -> None:
    before = Path(path).read_bytes()
    with pytest.raises(FileExistsError):
        key_file.create(path)
    assert Path(path).read_bytes() == before


def test_only_its_owner_may_read_it(path: str) -> None:
    for mode in (0o640, 0o604, 0o620, 0o666):
        os.chmod(path, mode)
        with pytest.raises(SealError, match="chmod 600"):
            key_file.take(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_it_belongs_to_the_user_of_the_process(path: str) -> None:
    os.chown(path, 12345, -1)
    with pytest.raises(SealError, match="12345"):
        key_file.take(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="geventaudit seal-key"):
        key_file.take(str(tmp_path / "none"))


def test_neither_a_folder_nor_a_link_is_a_key_file(path: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    for wrong in (str(tmp_path), str(link)):
        with pytest.raises(SealError):
            key_file.take(wrong)


def test_the_unfinished_file_of_a_killed_process_is_replaced(path: str) -> None:
    Path(path + ".next").write_text("half a k")
    assert key_file.take(path)[1] == 1
    assert key_file.take(path)[1] == 2


_TAKES = """
import hashlib, sys
from geventaudit.trail import key_file
for _ in range(5):
    master, start = key_file.take(sys.argv[1])
    print(start, hashlib.sha256(master._bytes).hexdigest())
"""


def test_no_two_processes_get_the_same_key(path: str) -> None:
    command = [sys.executable, "-c", _TAKES, path]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    taken = [line.split() for worker in workers for line in worker.communicate(timeout=120)[0].splitlines()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(int(start) for start, _ in taken) == list(range(1, 21))
    assert len({digest for _, digest in taken}) == 20


def test_a_lock_that_stays_is_said(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file, "_LOCK_SECONDS", 0.2)
    program = (
        f"import fcntl, sys; file = open({path!r}); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(SealError, match=r"locked by another process for more than 0\.2 s: run `fuser"):
            key_file.take(path)
        holder.communicate()
    assert key_file.take(path)[1] == 1

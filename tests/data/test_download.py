"""Downloads from a hub of our own on this machine: whole, cut off and resumed, wrong size, wrong hash, no room."""

import hashlib
import http.server
import re
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from rwkv_nb import __main__ as door
from rwkv_nb.data import download as module
from rwkv_nb.data import offers
from rwkv_nb.data.download import DownloadError, download

IDX, BIN = bytes(range(256)) * 40, bytes(i * 7 % 251 for i in range(300_000))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Hub:
    """What it holds, by the end of the address; what it was asked; and how it misbehaves."""

    def __init__(self):
        self.files = {}
        for name, data in (("minipile.idx", IDX), ("minipile.bin", BIN)):
            self.files[f"/datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424/{name}"] = data
        self.ranges, self.cut_at, self.sent, self.etags, self.ignore_range = [], None, {}, {}, False

    def handler(hub):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                data = hub.files.get(self.path)
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                name = self.path.rsplit("/", 1)[-1]
                total, start = len(data), 0
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if body:
                    hub.ranges.append((name, int(wanted[1]) if wanted else 0))
                if wanted and not hub.ignore_range:
                    start = int(wanted[1])
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("ETag", f'"{hub.etags.get(name, sha256(data))}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(total - start))
                self.end_headers()
                if body:
                    payload = hub.sent.get(name, data)[start:]
                    self.wfile.write(payload if hub.cut_at is None else payload[: hub.cut_at])

        return Handler


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # of what is under way, the last chunk is lost
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_whole_files_once(hub, tmp_path, capsys):
    assert door.main(["download", "minipile", "--to", str(tmp_path / "new" / "data")]) == 0
    folder = tmp_path / "new" / "data"
    assert (folder / "minipile.bin").read_bytes() == BIN and (folder / "minipile.idx").read_bytes() == IDX
    assert names(folder) == {"minipile.bin", "minipile.idx"}
    assert "minipile.bin  300,000 bytes" in capsys.readouterr().out
    assert hub.ranges == [("minipile.idx", 0), ("minipile.bin", 0)]
    download("minipile", folder, progress=False)
    assert len(hub.ranges) == 2, "what is there and whole is not fetched again"


def test_a_cut_connection_goes_on_by_itself(hub, tmp_path):
    hub.cut_at = 120_000
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN
    assert [start for name, start in hub.ranges if name == "minipile.bin"] == [0, 120_000, 240_000]


def test_a_killed_download_goes_on_days_later(hub, tmp_path):
    (tmp_path / "minipile.bin.part").write_bytes(BIN[:200_001])
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN and names(tmp_path) == {"minipile.bin", "minipile.idx"}
    assert ("minipile.bin", 200_001) in hub.ranges


def test_a_server_that_cannot_go_on_begins_anew(hub, tmp_path):
    hub.ignore_range = True
    (tmp_path / "minipile.bin.part").write_bytes(b"x" * 200_001)
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN


def test_a_part_that_is_complete_needs_no_transfer(hub, tmp_path):
    (tmp_path / "minipile.bin.part").write_bytes(BIN)
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN and [n for n, _ in hub.ranges] == ["minipile.idx"]


def test_a_part_that_is_too_long_is_begun_anew(hub, tmp_path):
    (tmp_path / "minipile.bin.part").write_bytes(BIN + b"x")
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN


def test_wrong_bytes_are_deleted_and_named(hub, tmp_path):
    hub.sent["minipile.bin"] = BIN[:-1] + b"x"
    with pytest.raises(DownloadError, match=f"minipile.bin: the sha256 .* the hub states {sha256(BIN)}"):
        download("minipile", tmp_path, progress=False)
    assert names(tmp_path) == {"minipile.idx"}
    hub.sent.clear()
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN


def test_small_files_have_the_hash_of_git(hub, tmp_path):
    hub.etags["minipile.idx"] = hashlib.sha1(b"blob %d\0" % len(IDX) + IDX).hexdigest()
    download("minipile", tmp_path, progress=False)
    hub.etags["minipile.idx"] = "0" * 40
    (tmp_path / "minipile.idx").unlink()
    with pytest.raises(DownloadError, match="minipile.idx: the sha1"):
        download("minipile", tmp_path, progress=False)


def test_a_server_that_sends_too_little_leaves_the_part(hub, tmp_path):
    hub.sent["minipile.bin"] = BIN[:100_000]
    with pytest.raises(DownloadError, match=r"minipile\.bin.*(call it again|is kept)"):
        download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin.part").read_bytes() == BIN[:100_000]
    assert not (tmp_path / "minipile.bin").exists()


@pytest.mark.parametrize("there", [b"mine", BIN[:-1] + b"x"])
def test_another_file_of_that_name_is_not_overwritten(hub, tmp_path, there):
    (tmp_path / "minipile.bin").write_bytes(there)
    with pytest.raises(DownloadError, match="minipile.bin: is there, but is not the file on the hub.*--to"):
        download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == there


def test_room_is_asked_for_before_anything_comes(hub, tmp_path, monkeypatch):
    (tmp_path / "minipile.bin.part").write_bytes(BIN[:100_000])
    needed = len(IDX) + len(BIN) - 100_000 + module.SPARE
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DownloadError, match="are still to come.*make room, or choose another disk with --to"):
        download("minipile", tmp_path, progress=False)
    assert hub.ranges == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    download("minipile", tmp_path, progress=False)


def test_a_disk_that_becomes_full(hub, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DownloadError, match="minipile.idx: No space left on device; call it again, it goes on"):
        download("minipile", tmp_path, progress=False)


def test_weights_are_looked_for_in_several_places(hub, tmp_path):
    hub.files["/BlinkDL/rwkv-5-world/resolve/main/RWKV-5-World-7B-v2-20240128-ctx4096.pth"] = b"weights"
    [path] = download("eagle-7b", tmp_path, progress=False)
    assert path.name == "RWKV-v5-Eagle-World-7B-v2-20240128-ctx4096.pth" and path.read_bytes() == b"weights"
    hub.files.clear()
    with pytest.raises(DownloadError, match="not found on the hub: RWKV/v5-Eagle-7B-pth/.*BlinkDL/rwkv-5-world"):
        download("eagle-7b", tmp_path, progress=False)


def test_without_a_connection_the_message_names_the_address(monkeypatch, tmp_path, capsys):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody listens on the discard port
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert door.main(["download", "minipile", "--to", str(tmp_path / "x")]) == 1
    err = capsys.readouterr().err
    assert "minipile.idx: no connection" in err and "another computer" in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_what_lies_there_is_named_when_the_hub_cannot_be_asked(monkeypatch, tmp_path):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    (tmp_path / "minipile.idx").write_bytes(IDX)
    with pytest.raises(DownloadError, match="no connection.*minipile.idx is there already, but could not be checked"):
        download("minipile", tmp_path, progress=False)


def test_help_says_what_to_put_where_by_hand(capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    for address, place in (
        ("datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424/minipile.bin", "data/minipile.bin"),
        ("co/RWKV/v5-Eagle-7B-pth/resolve/main/" + next(iter(module.OFFERS["eagle-7b"].files)), "model/RWKV-v5-Eagle"),
    ):
        assert f"{address}\n      -> {place}" in text


def test_files_that_are_here_are_found(hub, monkeypatch, tmp_path):
    a, b, name = tmp_path / "a", tmp_path / "b", next(iter(module.OFFERS["eagle-7b"].files))
    for folder in (a, b):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert offers.find("eagle-7b") is None and offers.find("eagle-7b", a, b) is None
    snapshot = tmp_path / "cache" / "models--BlinkDL--rwkv-5-world" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "RWKV-5-World-7B-v2-20240128-ctx4096.pth").write_bytes(b"w")  # as huggingface_hub lays it out
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", partial(
        huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path / "cache"))  # fmt: skip
    assert offers.find("eagle-7b", a) == [snapshot / "RWKV-5-World-7B-v2-20240128-ctx4096.pth"]
    (b / name).write_bytes(b"w")
    assert offers.find("eagle-7b", a, b) == [b / name], "one's own folders come first"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(b"w")
    assert offers.find("eagle-7b") == [Path("model", name)]
    (a / "minipile.idx").write_bytes(b"i")
    assert offers.find("minipile", a) is None, "one of two files is not enough"
    (b / "minipile.bin").write_bytes(b"b")
    assert offers.find("minipile", a, b) == [a / "minipile.idx", b / "minipile.bin"]
    with pytest.raises(ValueError, match="'pile': nothing of this name"):
        offers.find("pile")


def test_an_interrupt_leaves_what_has_come(hub, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    real = file_download.http_get

    def interrupted(url, file, **kwargs):
        if "minipile.bin" in url:
            file.write(BIN[:1000])
            raise KeyboardInterrupt
        real(url, file, **kwargs)

    monkeypatch.setattr(file_download, "http_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin.part").read_bytes() == BIN[:1000]
    monkeypatch.setattr(file_download, "http_get", real)
    download("minipile", tmp_path, progress=False)
    assert (tmp_path / "minipile.bin").read_bytes() == BIN and ("minipile.bin", 1000) in hub.ranges


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="'pile': nothing of this name; choose from minipile, eagle-7b"):
        download("pile", tmp_path)

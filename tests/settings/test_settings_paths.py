"""Data directories and files of settings, whatever they are called and however they were written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kernel.errors import SettingsError
from kernel.settings import Settings
from kernel.settings import toml as reading
from kernel.settings.sources import load, settings_of
from projections.database import database_url, open_database

ROOT = Path(__file__).parents[2]
NAMES = [
    "größe",
    'a"b',
    "o'brien",
    "50%25",
    "a%2Fb",
    "what?",
    "w?mode=ro&uri=true",
    "a#b",
    "a:b@c",
    "a\\b",
    "a\nb",
    " ",
]


def problem(*arguments: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*arguments)  # type: ignore[arg-type]
    (found,) = caught.value.problems
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_database_is_in_the_data_directory_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    engine = open_database(Settings().database.url_in(folder))
    with engine.connect():
        pass
    engine.dispose()
    assert (folder / "projections.db").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_url_is_of_the_working_directory_whatever_its_name_is(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    url = settings_of({"database.url": "sqlite:///./mine%3F.db?timeout=3"}).database.url
    assert url is not None
    assert database_url(url).database == str(tmp_path / name / "mine?.db")
    assert database_url(url).query == {"timeout": "3"}


@pytest.mark.parametrize("name", [os.fsdecode(b"a\xff"), "a\0b"])
def test_a_directory_that_cannot_be_written_down_is_refused(name: str) -> None:
    assert problem(None, {"data": name}, {}).startswith("data: ")


# files


@pytest.mark.parametrize(
    "content",
    [
        b"workers = 2",
        b"\xef\xbb\xbfworkers = 2\n",
        b"\r\nworkers = 2\r\n[stream]\r\nreplicas = 3\r\n",
        b"\xef\xbb\xbf# gr\xc3\xb6\xc3\x9fe\r\nworkers = 2",
    ],
)
def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(content)
    assert load(file, None, {}).settings.workers == 2


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"# nothing"])
def test_an_empty_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(content)
    assert load(file, None, {}).origins == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("workers = 2".encode("utf-16"), "encoded in UTF-16; save it in UTF-8"),
        ("workers = 2".encode("utf-32"), "encoded in UTF-32; save it in UTF-8"),
        ("a = 1\n# größe\n".encode("latin-1"), "line 2 is not UTF-8; save the file in UTF-8"),
        (b"workers = 2\0", "(at line 1"),
        (b"workers = 2\rdrain = 3", "(at line 1"),
        (b"workers = 2\nworkers = 3", "overwrite"),
        (b"data = " + b"[" * 5_000, ""),
    ],
)
def test_what_is_not_toml_in_utf8_is_refused_with_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(content)
    found = problem(file, None, {})
    assert found.startswith(f"{file}: ")
    assert says.lower() in found.lower()


def test_what_is_not_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem(tmp_path, None, {}) == f"{tmp_path}: a directory, not a TOML file"
    assert problem(None, None, {"ESKERNEL_CONFIG": str(tmp_path)}) == f"{tmp_path}: a directory, not a TOML file"
    assert problem(tmp_path / "s.toml", None, {}).endswith(": no such file")
    assert problem(tmp_path / ("n" * 300), None, {}).endswith(": it can't be read: file name too long")
    assert "it can't be read" in problem(Path("a\0b"), None, {})
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    assert "it can't be read: too many levels" in problem(loop, None, {})
    Path("eskernel.toml").mkdir()
    assert problem(None, None, {}) == "eskernel.toml: a directory, not a TOML file"
    Path("eskernel.toml").rmdir()
    Path("eskernel.toml").symlink_to("nowhere")
    assert problem(None, None, {}) == "eskernel.toml: no such file"


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("workers = 2\n" + "# a long comment\n" * 20_000,))
    writer.start()
    assert load(pipe, None, {}).settings.workers == 2
    writer.join()


def test_a_pipe_that_nothing_writes_to_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIPE_TIMEOUT_S", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "nothing came through this pipe within 0.05 s" in problem(pipe, None, {})


# variables

KUBERNETES = {
    "ESKERNEL_SERVICE_HOST": "10.0.0.11",
    "ESKERNEL_SERVICE_PORT": "8080",
    "ESKERNEL_SERVICE_PORT_HTTP": "8080",
    "ESKERNEL_SERVICE_PORT_HTTP_METRICS": "9090",
    "ESKERNEL_PORT": "tcp://10.0.0.11:8080",
    "ESKERNEL_PORT_8080_TCP": "tcp://10.0.0.11:8080",
    "ESKERNEL_PORT_8080_TCP_PROTO": "tcp",
    "ESKERNEL_PORT_8080_TCP_PORT": "8080",
    "ESKERNEL_PORT_8080_TCP_ADDR": "10.0.0.11",
    "ESKERNEL_PORT_53_UDP": "udp://10.0.0.11:53",
    "ESKERNEL_PORT_53_UDP_ADDR": "fd00::b",
    "ESKERNEL_HTTP_SERVICE_HOST": "10.0.0.11",
    "ESKERNEL_HTTP_SERVICE_PORT": "8080",
    "ESKERNEL_HTTP_PORT": "tcp://10.0.0.11:8080",
    "ESKERNEL_HTTP_PORT_8080_TCP_ADDR": "10.0.0.11",
    "ESKERNEL_MY_OWN_2_PORT_9_SCTP_PROTO": "sctp",
}


def test_variables_of_kubernetes_services_are_not_ours() -> None:
    loaded = load(None, None, {**KUBERNETES, "ESKERNEL_WORKERS": "2"})
    assert loaded.settings == settings_of({"workers": 2})
    assert set(loaded.ignored) == set(KUBERNETES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ESKERNEL_PORT", "8080"),
        ("ESKERNEL_HTTP_PORT", "8080"),
        ("ESKERNEL_SERVICE", "x"),
        ("ESKERNEL_PORTS", "tcp://10.0.0.11:8080"),
        ("ESKERNEL_PORT_8080", "8080"),
        ("ESKERNEL_STREAM_REPLICAS", "3"),
        ("ESKERNEL_WORKER", "3"),
        ("eskernel_service_host", "10.0.0.11"),
    ],
)
def test_a_mistyped_variable_is_still_refused(name: str, value: str) -> None:
    assert problem(None, None, {name: value}).startswith(f"{name}: no such setting; ")


def test_a_section_of_ours_is_ours_whatever_its_value_is() -> None:
    assert "http.port" in problem(None, None, {"ESKERNEL_HTTP__PORT": "tcp://10.0.0.11:8080"})


def test_the_nearest_setting_is_suggested_for_a_single_underscore() -> None:
    found = problem(None, None, {"ESKERNEL_HTTP_PORT": "8080"})
    assert found == "ESKERNEL_HTTP_PORT: no such setting; the nearest is ESKERNEL_HTTP__PORT"


@pytest.mark.skipif(sys.platform != "linux", reason="shells give the pipe a name in /dev/fd")
def test_the_command_line_reads_a_pipe_of_the_shell(tmp_path: Path) -> None:
    script = f"{sys.executable} -m kernel.cli config show --changed --config <(echo 'workers = 7')"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("workers  7"), done.stderr

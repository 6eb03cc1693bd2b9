"""0.0 means 0.0 on any CPU: the reference is the real one, and ran on the tests' own torch, kernels and threads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import reference_run
import torch
import transformers
from reference_run import PACKAGES, REQUIREMENTS, SCRIPT, NoReference, kernels, key_of, reference_in

# ------------------------------------------------------------------------------------------------- what was computed


@pytest.fixture(scope="module")
def ran(reference: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((reference / "run.json").read_text())
    return found


def test_the_reference_is_the_other_package(ran: dict[str, str]) -> None:
    assert ran["transformers"] == "4.40.2" != transformers.__version__
    assert Path(ran["classes"]) == PACKAGES / "transformers" / "models" / "qdqbert" / "modeling_qdqbert.py"
    assert not hasattr(transformers, "QDQBertModel")


@pytest.mark.usefixtures("threads_of_the_reference")
def test_the_reference_ran_on_the_same_torch_kernels_and_threads(ran: dict[str, str]) -> None:
    assert ran["torch"] == torch.__config__.show()
    assert "CPU capability usage" in ran["torch"]
    assert ran["threads"] == torch.__config__.parallel_info()
    assert "get_num_threads() : 2" in ran["threads"]


# ----------------------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("MKL_CBWR", "COMPATIBLE"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("DNNL_MAX_CPU_ISA", "AVX2"),
        ("OMP_NUM_THREADS", "1"),
        ("NPY_DISABLE_CPU_FEATURES", "AVX512F"),
        ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2"),
        ("LD_PRELOAD", "libm.so"),
    ],
)
def test_a_variable_that_chooses_kernels_changes_the_key(name: str, value: str) -> None:
    keys = {key_of(kernels(environment), PACKAGES, SCRIPT) for environment in ({}, {name: value}, {name: f"{value}0"})}
    assert len(keys) == 3


def test_another_variable_leaves_the_key() -> None:
    keys = {key_of(kernels(environment), PACKAGES, SCRIPT) for environment in ({}, {"HOME": "/"}, {"LANG": "C"})}
    assert len(keys) == 1


@pytest.mark.parametrize("part", ["cpu", "code", "torch"])
def test_another_machine_code_or_build_changes_the_key(
    part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, script = key_of({}, PACKAGES, SCRIPT), SCRIPT
    if part == "cpu":
        assert reference_run.cpu()
        monkeypatch.setattr(reference_run, "cpu", lambda: ["flags : none"])
    elif part == "torch":
        monkeypatch.setattr(torch.__config__, "show", lambda: "CPU capability usage: another")
    else:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.read_text() + "\n")
    assert key_of({}, PACKAGES, script) != before


# ----------------------------------------------------------------------------------------------------------- the run


def writing(path: Path, code: str) -> Path:
    """A script in make_reference.py's place."""
    path.write_text(f"import sys, pathlib, time\nfolder = pathlib.Path(sys.argv[1])\n{code}\n")
    return path


def installed(folder: Path, *but: str) -> Path:
    """A folder in which the reference's packages seem to lie."""
    for name, version in reference_run.pinned().items():
        made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        made.mkdir(parents=True)
        found = "1.0" if name in but else version
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    return folder


def test_it_runs_once_for_all_that_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = writing(tmp_path / "script.py", f"open({str(log)!r}, 'a').write('ran;')\ntime.sleep(0.5)\nfolder.mkdir()")
    packages, found = installed(tmp_path / "packages"), []
    waiting = [
        threading.Thread(target=lambda: found.append(reference_in(tmp_path, packages, script))) for _ in range(3)
    ]
    for one in waiting:
        one.start()
    for one in waiting:
        one.join()
    assert len(found) == 3
    assert len({*found}) == 1
    assert found[0].is_dir()
    assert log.read_text() == "ran;"


def test_it_sees_the_reference_s_packages_first(tmp_path: Path) -> None:
    packages = installed(tmp_path / "packages")
    script = writing(tmp_path / "script.py", "folder.mkdir()\n(folder / 'path').write_text('|'.join(sys.path[:2]))")
    folder = reference_in(tmp_path, packages, script)
    assert (folder / "path").read_text() == f"{tmp_path}|{packages}"


def test_a_run_that_fails_is_a_failure_and_leaves_nothing(tmp_path: Path) -> None:
    packages = installed(tmp_path / "packages")
    script = writing(tmp_path / "script.py", "folder.mkdir()\n(folder / 'half').touch()\nraise OSError('no room')")
    (tmp_path / "cache").mkdir()
    with pytest.raises(NoReference, match=r"(?s)did not run: .*script\.py.*OSError: no room"):
        reference_in(tmp_path / "cache", packages, script)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("but", "said"),
    [
        (None, r"transformers 4\.40\.2 \(none found\), huggingface-hub"),
        ("transformers", r"wanted transformers 4\.40\.2 \(1\.0 found\)\."),
        ("charset-normalizer", r"wanted charset-normalizer \S+ \(1\.0 found\)\."),
    ],
)
def test_a_missing_reference_is_a_failure_that_says_how_to_install_it(
    but: str | None, said: str, tmp_path: Path
) -> None:
    packages = installed(tmp_path / "packages", but) if but else tmp_path / "packages"
    with pytest.raises(NoReference, match=said) as failure:
        reference_in(tmp_path, packages)
    assert "bash scripts/test.sh" in str(failure.value)
    assert f"pip install --no-deps --target {packages} -r {REQUIREMENTS}" in str(failure.value)
    # No skip: pytest counts it as failed.
    assert isinstance(failure.value, pytest.fail.Exception)
    assert not isinstance(failure.value, pytest.skip.Exception)

"""The walk of `walkthrough.py`, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.job


@pytest.mark.timeout(1500)
def test_a_user_with_own_data_loses_nothing_and_gets_one_line_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/support/walkthrough.py"), str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of the steps went otherwise" in done.stdout

"""What all tests share: one thread for each process, and a working directory of its own for each test.

Networks of this size gain nothing from a second thread, so two workers of one thread each (pytest.ini) are faster than one of two. What a command
left in the folder where pytest was started, as ./c2l_run, changes no test.
"""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402  torch reads the number of threads when it is imported

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

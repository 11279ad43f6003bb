"What the tests of several modules share."
import os
import pytest

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # two processes, a core each
import torch


@pytest.fixture(scope='module')
def one_thread():
    "Small networks are slower on two threads than on one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded(one_thread): torch.manual_seed(0)

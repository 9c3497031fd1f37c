import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def shared():
    """The folder of real weights and datasets; tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get('NANOWM_SHARED') or ROOT.parent / 'shared')
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} does not exist (NANOWM_SHARED names another folder)')
    return folder

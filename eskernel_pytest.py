"""eskernel's plugin for pytest, which finds it by itself: the fixture `running`.

It is a module of its own, apart from the package `kernel`: pytest imports it in every project of an environment, and
some of those have a folder `kernel`. It imports eskernel only where a test asks for the fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kernel.testing import Running


@pytest.fixture
def running() -> Running:
    """Return what runs a whole app in the process of the test: see `kernel.testing.running`."""
    from kernel.testing import running

    return running

import os
import signal

import pytest

from sparsight.utils.interrupt import sigterm_as_interrupt


def test_sigterm_interrupts_the_block_and_nothing_after_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

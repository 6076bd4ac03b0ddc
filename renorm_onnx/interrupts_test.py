import signal

import pytest

from renorm_onnx.interrupts import interrupts_held


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_end_of_the_block():
    ended = []

    def block():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert ended
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

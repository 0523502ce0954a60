"""A layer's tokens spread over real ranks, without SGLang: the answer is the plain sum, whatever the batch's size."""

import pytest
from processes import ran


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_size_of_batch_is_answered(ranks, tmp_path):
    codes, outputs = ran("spread_program.py", ranks, [str(tmp_path / "store"), "{rank}", str(ranks)], 200)
    assert codes == [0] * ranks, "\n".join(outputs)[-3000:]

import pytest
import torch
from torch.nn.functional import cross_entropy

from herd.data.encode import IGNORE
from herd.train.losses import next_token_loss


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_equal_plain_cross_entropy_and_its_gradients(chunk):
    torch.manual_seed(0)
    output = torch.nn.Linear(8, 11, bias=False)
    hidden = torch.randn(2, 9, 8)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :4] = IGNORE

    def run(loss):
        h = hidden.clone().requires_grad_()
        output.weight.grad = None
        value = loss(h)
        value.backward()
        return value.detach(), h.grad, output.weight.grad.clone()

    plain = run(
        lambda h: cross_entropy(output(h).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    )
    chunked = run(lambda h: next_token_loss(h, labels, output, chunk))
    for a, b in zip(plain, chunked, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_learn_gives_zero():
    output = torch.nn.Linear(4, 5)
    assert next_token_loss(torch.randn(3, 4), torch.full((3,), IGNORE), output, 2).item() == 0

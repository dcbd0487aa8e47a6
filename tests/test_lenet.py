"""The network is LeNet: another one has other tests in this place."""

import pytest
import torch
from support.training import CLASSES, make_dataset
from torch import nn

from stages.lenet import LeNet, convolve_patches


def test_lenet_has_its_parameters_and_standardises_its_input() -> None:
    model = LeNet("sigmoid", CLASSES, (28, 28), mean=10.0, std=2.0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 44_426
    images = torch.from_numpy(make_dataset(4).images)
    plain = LeNet("sigmoid", CLASSES, (28, 28), mean=0.0, std=1.0)
    plain.load_state_dict(model.state_dict() | {"mean": plain.mean, "std": plain.std})
    shifted = ((images.float() - 10.0) / 2.0).unsqueeze(1)
    reference = torch.nn.functional.conv2d(shifted, model.conv1.weight, model.conv1.bias)
    reference = torch.nn.functional.max_pool2d(torch.sigmoid(reference), 2)  # sigmoid before pooling, as LeNet is drawn
    reference = torch.nn.functional.max_pool2d(torch.sigmoid(model.conv2(reference)), 2).flatten(1)
    reference = model.fc3(torch.sigmoid(model.fc2(torch.sigmoid(model.fc1(reference)))))
    assert torch.allclose(model(images), reference, atol=1e-6)
    assert not torch.allclose(plain(images), reference)


@pytest.mark.parametrize(("channels", "kernel_size"), [(1, 5), (6, 5), (3, (3, 2))])
def test_the_product_of_patches_is_the_convolution_and_has_its_gradients(
    channels: int, kernel_size: int | tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 4, kernel_size).double()
    x = torch.rand(2, channels, 12, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for output in (layer(x), convolve_patches(layer, x)):
        gradients = torch.autograd.grad((output**2).sum(), [x, *layer.parameters()])
        results.append([output, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)

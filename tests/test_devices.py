"""support/devices.py: what the project knows about devices that are not here."""

import pytest
import torch

from support.devices import peak_flops


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX A4000", None),  # no A40
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(monkeypatch, name, flops):
    """The speed of any other GPU is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: 1 / 0)  # the measurement needs it
    device = torch.device("cuda")
    if flops:
        assert peak_flops(device, torch.bfloat16) == flops
    else:
        with pytest.raises(ZeroDivisionError):
            peak_flops(device, torch.bfloat16)

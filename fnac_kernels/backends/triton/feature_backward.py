"""The gradient of the features: the sounds' first, so that dImg is not there yet while they read the image's cells."""

from __future__ import annotations

from torch import Tensor

from fnac_kernels.backends.triton.audio_gradient import audio_gradient
from fnac_kernels.backends.triton.image_gradient import image_gradient
from fnac_kernels.backends.triton.launch import on_image


def feature_backward(
    img: Tensor,
    aud: Tensor | None,
    tau: float,
    *,
    grad_logits: Tensor | None,
    argmax: Tensor | None,
    grad_maps: Tensor | None,
    mask: Tensor | None,
    grad_avg: Tensor | None,
    grad_foreground: Tensor | None,
    grad_aud: Tensor | None,
    need_img: bool,
    need_aud: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dimg = daud = None
    with on_image(img):
        if need_aud and aud is not None:
            daud = audio_gradient(img, aud, tau, grad_logits, argmax, grad_maps, grad_aud)
        if need_img:
            dimg = image_gradient(img, aud, tau, grad_logits, argmax, grad_maps, mask, grad_avg, grad_foreground)
    return dimg, daud

"""The metrics against a loop in numpy that follows their definition pixel by pixel, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fnac.metrics import (
    LocalizationScores,
    adaptive_ciou,
    centre_box,
    ciou,
    confidence,
    detection,
    oracle,
    pointing,
    upsample,
    whole_frame,
)


def loop_scores(maps: np.ndarray, gts: np.ndarray) -> dict[str, float]:
    """One sample, one pixel, one threshold at a time."""
    cious, adaptive, hits = [], [], []
    for heat, gt in zip(maps, gts, strict=True):
        values = sorted(heat.reshape(-1).tolist())
        area = int((gt > 0).sum())
        for threshold, out in ((values[len(values) // 2], cious), (values[-max(area, 1)], adaptive)):
            inter = union = 0.0
            for value, truth in zip(heat.reshape(-1).tolist(), gt.reshape(-1).tolist(), strict=True):
                predicted = value >= threshold
                inter += truth if predicted else 0
                union += truth + (1 if predicted and truth == 0 else 0)
            out.append(inter / union)
        peak = np.unravel_index(heat.argmax(), heat.shape)
        hits.append(float(gt[peak] > 0))
    rates = [np.mean(np.array(cious) >= 0.05 * i) for i in range(21)]
    auc = sum((rates[i] + rates[i + 1]) / 2 * 0.05 for i in range(20))
    return {
        "ap50": float(np.mean(np.array(cious) >= 0.5)),
        "ciou": float(np.mean(cious)),
        "auc": float(auc),
        "pointing": float(np.mean(hits)),
        "adaptive_ciou": float(np.mean(adaptive)),
    }


def samples(count: int = 12, size: int = 14, consensus: bool = False) -> tuple[Tensor, Tensor]:
    """Random maps with ground truths of every area from one pixel to nearly the whole frame, overlapping maps a bit."""
    rng = np.random.default_rng(5)
    maps = rng.standard_normal((count, size, size)).astype(np.float32)
    gt = np.zeros_like(maps)
    for i in range(count):
        side = 1 + i * (size - 2) // (count - 1)
        x, y = rng.integers(0, size - side, 2)
        gt[i, y : y + side, x : x + side] = 1
        if consensus:
            gt[i, : side // 2] = 0.5
        maps[i] += 1.5 * gt[i]
    return torch.from_numpy(maps), torch.from_numpy(gt)


def scores(maps: Tensor, gt: Tensor, batch_size: int) -> dict[str, float]:
    metric = LocalizationScores()
    index = torch.arange(len(maps))
    for part, truth, at in zip(maps.split(batch_size), gt.split(batch_size), index.split(batch_size), strict=True):
        metric.update(part, truth, at)
    return {name: float(value) for name, value in metric.compute().summary.items()}


@pytest.mark.parametrize("consensus", [False, True])
def test_scores_equal_a_loop_over_pixels(consensus):
    maps, gt = samples(consensus=consensus)
    expected = loop_scores(maps.numpy(), gt.numpy())
    assert scores(maps, gt, 5) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected.values())) == 5  # the case tells the five apart


def test_scores_do_not_depend_on_the_batch_size():
    maps, gt = samples()
    assert scores(maps, gt, 1) == pytest.approx(scores(maps, gt, 12), abs=1e-15)


def test_a_constant_map_counts_every_pixel_and_points_nowhere_in_particular():
    _, gt = samples()
    share = gt.double().mean(dim=(1, 2))
    assert torch.allclose(ciou(whole_frame(gt), gt), share)
    assert torch.allclose(pointing(whole_frame(gt), gt), share)


def test_an_empty_ground_truth_scores_zero():
    maps, gt = torch.rand(2, 8, 8), torch.zeros(2, 8, 8)
    for score in (ciou, adaptive_ciou, pointing):
        assert score(maps, gt).tolist() == [0.0, 0.0]


def test_ciou_of_exactly_one_half_is_a_success():
    gt = torch.zeros(1, 4, 4)
    gt[0, 0] = 1  # 4 of 16 pixels, all within the upper half: 4 / 8
    assert ciou(oracle(gt), gt).item() == 0.5
    assert scores(oracle(gt), gt, 1)["ap50"] == 1.0


@pytest.mark.parametrize("consensus", [False, True])
def test_no_half_frame_beats_the_oracle(consensus):
    maps, gt = samples(consensus=consensus)
    best = ciou(oracle(gt), gt)
    assert (best >= ciou(maps, gt)).all()
    assert (best >= ciou(gt + 0.1 * torch.rand(gt.shape), gt)).all()
    if not consensus:
        area, half = gt.sum(dim=(1, 2)).double(), gt[0].numel() / 2
        assert torch.allclose(best, torch.minimum(area / half, half / area))
        assert (pointing(oracle(gt), gt) == 1).all()
        assert torch.allclose(adaptive_ciou(oracle(gt), gt), torch.ones_like(best))


def test_the_centre_box_predicts_a_centred_square_of_half_the_frame():
    gt = torch.zeros(1, 224, 224)
    heat = centre_box(gt)[0]
    predicted = heat >= heat.flatten().kthvalue(224 * 224 // 2 + 1).values
    rows, columns = predicted.any(dim=1).nonzero().flatten(), predicted.any(dim=0).nonzero().flatten()
    assert rows.tolist() == columns.tolist() == list(range(rows[0], 224 - rows[0]))
    assert int(predicted.sum()) == len(rows) ** 2
    assert 0.5 <= len(rows) ** 2 / 224**2 < 0.52  # 158 pixels a side are less than half, so 160


@pytest.mark.parametrize("mode", ["bicubic", "bilinear_align_corners"])
def test_upsampling_keeps_each_map_to_itself_and_places_corners_as_named(mode):
    maps = torch.rand(3, 7, 5)
    larger = upsample(maps, mode=mode)
    assert larger.shape == (3, 224, 224)
    assert torch.equal(larger[1], upsample(maps[1:2], mode=mode)[0])
    on_the_corner = torch.allclose(larger[:, 0, 0], maps[:, 0, 0])
    assert on_the_corner == (mode == "bilinear_align_corners")
    assert upsample(maps.bfloat16(), mode=mode).dtype == torch.float32


def test_scores_keep_double_precision_when_the_model_is_cast():
    metric = LocalizationScores().to(torch.bfloat16)
    metric.update(*samples(), torch.arange(12))
    assert {value.dtype for value in metric.compute().summary.values()} == {torch.float64}


def test_shards_add_up_to_the_whole():
    maps, gt = samples()
    merged, other = LocalizationScores(), LocalizationScores()
    for metric, at in ((merged, torch.arange(0, 12, 2)), (other, torch.arange(1, 12, 2))):
        metric.update(maps[at], gt[at], at)
    merged.rows += other.rows
    summary, clips = merged.compute()
    assert {name: float(value) for name, value in summary.items()} == scores(maps, gt, 12)
    assert torch.equal(clips["ciou"], ciou(maps, gt))  # in the data set's order


def test_clips_without_a_source_count_for_detection_alone():
    maps, gt = samples()
    positive = torch.arange(12) % 3 > 0
    metric = LocalizationScores()
    metric.update(maps, gt, torch.arange(12), positive)
    summary = {name: float(value) for name, value in metric.compute().summary.items()}
    ap, f1 = detection(confidence(maps).double(), ciou(maps, gt) >= 0.5, positive)
    assert summary == scores(maps[positive], gt[positive], 12) | {"ap": float(ap), "max_f1": float(f1)}


def loop_detection(confidences, hits, positives):
    """One threshold at a time; the area under the best precision at each recall or a higher one."""
    points = []
    for threshold in sorted(set(confidences), reverse=True):
        found = [c >= threshold for c in confidences]
        right = sum(f and p and h for f, p, h in zip(found, positives, hits, strict=True))
        missed = sum(p and not f for f, p in zip(found, positives, strict=True))
        points.append((right / sum(found), right / (right + missed) if right + missed else 0.0))
    area, before = 0.0, 0.0
    for i, (_, recall) in enumerate(points):
        area += (recall - before) * max(precision for precision, _ in points[i:])
        before = recall
    return area, max(2 * p * r / (p + r) if p + r else 0.0 for p, r in points)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [4, 1000])  # with equal confidences, and almost without
def test_detection_equals_a_loop_over_thresholds(seed, levels):
    rng = np.random.default_rng(seed)
    found = rng.integers(0, levels, 60).astype(np.float64)
    hits, positives = rng.random(60) < 0.6, rng.random(60) < 0.5
    measured = detection(torch.from_numpy(found), torch.from_numpy(hits), torch.from_numpy(positives))
    assert [float(value) for value in measured] == pytest.approx(loop_detection(found, hits, positives), abs=1e-12)


def test_detection_is_perfect_where_every_source_is_found_first():
    positive = torch.tensor([True, False, True, False])
    perfect = detection(torch.tensor([0.9, 0.2, 0.8, 0.1]), positive, positive)
    assert [float(value) for value in perfect] == [1.0, 1.0]
    nowhere = detection(torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.zeros(4, dtype=torch.bool), positive)
    assert [float(value) for value in nowhere] == [0.0, 0.0]


def test_confidence_is_the_mean_of_the_highest_quarter():
    maps = torch.arange(16.0).view(1, 4, 4).flip(1)
    assert confidence(maps).tolist() == [(12 + 13 + 14 + 15) / 4]


def test_bad_input_is_named():
    gt = torch.ones(2, 8, 8)
    with pytest.raises(ValueError, match=r"maps and gt must both have shape.*\(2, 7, 7\) and \(2, 8, 8\)"):
        ciou(torch.ones(2, 7, 7), gt)
    with pytest.raises(ValueError, match="maps must be finite"):
        LocalizationScores().update(torch.full((2, 8, 8), torch.nan), gt, torch.arange(2))
    with pytest.raises(ValueError, match='mode must be "bicubic"'):
        upsample(gt, mode="nearest")
    with pytest.raises(ValueError, match=r"maps must have shape \(N, h, w\)"):
        upsample(torch.ones(8, 8))

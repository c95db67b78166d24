"""Task metrics against scikit-learn, SciPy and counting by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from mlorq.data import metrics


def drawn(seed: int, samples: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Labels of two classes and predictions that agree with most of them."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, samples)
    return np.where(random.random(samples) < 0.7, labels, 1 - labels), labels


@pytest.mark.parametrize("seed", range(4))
def test_classification_metrics_agree_with_scikit_learn(seed):
    predicted, labels = drawn(seed)
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert metrics.f1(predicted, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predicted))
    assert metrics.matthews(predicted, labels) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted))
    # The classes are not interchangeable: f1 is of class 1.
    assert metrics.f1(1 - predicted, 1 - labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predicted, pos_label=0)
    )
    assert metrics.matthews(1 - predicted, labels) == pytest.approx(-metrics.matthews(predicted, labels))


def test_classification_metrics_by_hand():
    predicted, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert metrics.accuracy(predicted, labels) == pytest.approx(3 / 5)
    assert metrics.f1(predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.matthews(predicted, labels) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))


def test_metrics_of_constant_predictions_are_zero():
    ones, mixed = np.ones(6, dtype=int), np.array([0, 1, 1, 0, 1, 0])
    assert metrics.f1(0 * ones, 0 * ones) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.matthews(ones, mixed) == metrics.matthews(mixed, ones) == 0
        # Neither prediction is ever class 1.
        assert metrics.matthews(np.array([0, 2, 2, 0, 2, 0]), mixed) == 0
        # What a model collapsed to one output gives: no NaN, which JSON does not have.
        assert metrics.pearson(0.3 * ones, mixed) == metrics.spearman(0.3 * ones, mixed) == 0
        assert metrics.pearson(mixed * 0.7, ones) == metrics.spearman(mixed * 0.7, ones) == 0


@pytest.mark.parametrize("seed", range(4))
def test_correlations_agree_with_scipy(seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=150)
    labels = np.round(values + random.normal(size=150), 1)  # many ties
    assert len(np.unique(labels)) < 100
    assert metrics.pearson(values, labels) == pytest.approx(scipy.stats.pearsonr(values, labels).statistic)
    ranks = scipy.stats.rankdata(values), scipy.stats.rankdata(labels)
    assert metrics.spearman(values, labels) == pytest.approx(scipy.stats.pearsonr(*ranks).statistic)
    assert metrics.spearman(np.exp(values), labels) == pytest.approx(metrics.spearman(values, labels))
    assert metrics.pearson(np.exp(values), labels) != pytest.approx(metrics.pearson(values, labels))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_agrees_with_scikit_learn(k):
    random = np.random.default_rng(k)
    logits, labels = random.normal(size=(300, 8)), random.integers(0, 8, 300)
    wanted = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(8))
    assert metrics.top_k_accuracy(logits, labels, k) == pytest.approx(wanted)
    assert metrics.top_k_accuracy(-logits, labels, k) != pytest.approx(wanted)


def test_top_k_accuracy_by_hand():
    logits = np.array([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3], [-1.0, -2.0, -3.0], [0.2, 0.3, 0.4]])
    labels = np.array([1, 2, 0, 0])
    assert metrics.top_k_accuracy(logits, labels, 1) == 0.5
    assert metrics.top_k_accuracy(logits, labels, 2) == 0.75
    assert metrics.top_k_accuracy(logits, labels, 3) == metrics.top_k_accuracy(logits, labels, 5) == 1.0


def test_every_metric_of_a_configuration_exists():
    from typing import get_args

    from mlorq.config.sections import source_section

    named = get_args(get_args(source_section().model_fields["metric"].annotation)[0])
    others = {
        "box_ap",
        "mask_ap",
        metrics.NEIGHBOURS,
        metrics.PERPLEXITY,
        metrics.MIOU,
        metrics.ZERO_SHOT,
        metrics.RECALL,
    }  # not of predictions and labels alone
    assert set(named) - others == set(metrics.CLASSIFICATION) | set(metrics.CORRELATION)
    assert not set(metrics.CLASSIFICATION) & set(metrics.CORRELATION)


def test_votes_of_neighbours_are_those_of_each_sample_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for samples, k in ((40, 20), (7, 20), (30, 1)):
        features, labels = draw.normal(size=(samples, 5)), draw.integers(0, 4, samples) * 3
        hits = 0
        for own in range(samples):
            votes: dict[int, float] = {}
            cosines = []
            for other in range(samples):
                if other != own:
                    pair = features[own], features[other]
                    cosines.append((pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1]), other))
            for cosine, other in sorted(cosines, reverse=True)[:k]:
                votes[labels[other]] = votes.get(labels[other], 0.0) + np.exp(cosine / 0.07)
            hits += max(sorted(votes), key=lambda label: votes[label]) == labels[own]
        assert metrics.nearest_neighbours(features, labels, k) == hits / samples


def test_mean_iou_is_that_of_sets_of_pixels(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for classes, pixels in ((2, 9), (5, 300), (40, 20)):  # in the last case some classes do not occur
        labels, predicted = draw.integers(0, classes, (2, pixels))
        confusion = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(confusion, (labels, predicted), 1)
        shares = []
        for number in range(classes):
            ours, theirs = set(np.flatnonzero(labels == number)), set(np.flatnonzero(predicted == number))
            if ours | theirs:
                shares.append(len(ours & theirs) / len(ours | theirs))
        assert metrics.mean_iou(confusion) == pytest.approx(np.mean(shares))
    assert metrics.mean_iou(np.zeros((3, 3), dtype=np.int64)) == 0.0


def test_zero_shot_accuracy_is_that_of_each_image_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for samples, classes, templates in ((50, 4, 3), (7, 2, 1)):
        images, prompts = draw.normal(size=(samples, 6)), draw.normal(size=(classes, templates, 6))
        prompts *= draw.uniform(0.1, 10, (classes, templates, 1))  # their lengths do not count
        labels = draw.integers(0, classes, samples)
        hits = 0
        for image, label in zip(images, labels, strict=True):
            cosines = []
            for own in prompts:
                mean = sum(prompt / np.linalg.norm(prompt) for prompt in own)
                cosines.append(image @ mean / np.linalg.norm(image) / np.linalg.norm(mean))
            hits += cosines.index(max(cosines)) == label
        assert metrics.zero_shot_accuracy(images, prompts, labels) == hits / samples


def test_first_recalls_are_those_of_each_pair_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    images, texts = draw.normal(size=(20, 5)), draw.normal(size=(30, 5))
    owners = np.concatenate([np.arange(20), draw.integers(0, 20, 10)])
    texts += images[owners]
    pairs = {(int(image), text) for text, image in enumerate(owners)} | {(0, 1)}  # a text of two images

    def cosine(image: int, text: int) -> float:
        return images[image] @ texts[text] / np.linalg.norm(images[image]) / np.linalg.norm(texts[text])

    there = [(image, max(range(30), key=lambda text: cosine(image, text))) in pairs for image in range(20)]
    back = [(max(range(20), key=lambda image: cosine(image, text)), text) in pairs for text in range(30)]
    found = metrics.first_recalls(images, texts, np.array(sorted(pairs)))
    assert found == (np.mean(there), np.mean(back))
    assert 0 < found[0] < 1

"""Task metrics against scikit-learn, SciPy and counting by hand."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sklearn.linear_model import Ridge

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

    named = get_args(get_args(get_args(get_args(source_section().model_fields["metric"].annotation)[0])[0])[0])
    others = {
        "box_ap",
        "mask_ap",
        *metrics.FEATURES,
        metrics.RANKING,
        metrics.WORD_ERRORS,
        metrics.PERPLEXITY,
        metrics.MIOU,
        metrics.MASK_IOU,
        metrics.DEPTH_ERROR,
        metrics.ZERO_SHOT,
        metrics.RECALL,
        metrics.ENTITIES,
        metrics.ANSWER,
        metrics.EXACT,
        metrics.CHOICE,
        metrics.CHOICE_NORM,
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


def test_a_linear_probe_is_the_regression_on_the_other_half(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for samples, width, classes in ((61, 4, 3), (30, 40, 2)):
        labels = draw.integers(0, classes, samples) * 5  # class numbers with gaps
        features = draw.normal(size=(samples, width)) + labels[:, None] * draw.normal(size=width) / 5
        features[:, 1] = 7.0  # a constant, which tells nothing
        hits = 0
        for start in (0, 1):
            train, other = range(start, samples, 2), range(1 - start, samples, 2)
            fit = Ridge(alpha=0.1 * len(train))
            fit.fit(_standard(features[train], features[train]), _ones(labels[train], labels))
            best = fit.predict(_standard(features[other], features[train])).argmax(1)
            hits += int((np.unique(labels)[best] == labels[other]).sum())
        assert metrics.linear_probe(features, labels) == hits / samples


def _standard(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    keep = [0, *range(2, values.shape[1])]  # without the constant
    return (values[:, keep] - like[:, keep].mean(0)) / like[:, keep].std(0)


def _ones(labels: np.ndarray, all_labels: np.ndarray) -> np.ndarray:
    return np.array([[float(label == one) for one in np.unique(all_labels)] for label in labels])


def _least_edits(words: tuple[str, ...], reference: tuple[str, ...]) -> int:
    """Every way to begin: the last words are matched or substituted, one is too many, or one is missing."""

    @cache
    def least(left: int, right: int) -> int:
        if not left or not right:
            return left + right
        both = least(left - 1, right - 1) + (words[left - 1] != reference[right - 1])
        return min(both, least(left - 1, right) + 1, least(left, right - 1) + 1)

    return least(len(words), len(reference))


def test_word_errors_are_the_least_number_of_edits(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(60):
        words, reference = (tuple(draw.choice(["the", "dog", "runs"], draw.integers(0, 9))) for _ in range(2))
        assert metrics.word_errors(words, reference) == _least_edits(words, reference)
        assert metrics.word_errors(reference, words) == metrics.word_errors(words, reference)


@pytest.mark.parametrize(
    ("heard", "spoken", "errors"),
    [
        ("the dog runs", "the dog runs", 0),
        ("a dog runs", "the dog runs", 1),  # a substitution
        ("dog runs", "the dog runs", 1),  # a deletion
        ("the big dog runs", "the dog runs", 1),  # an insertion
        ("", "the dog runs", 3),
        ("the dog", "", 2),
    ],
)
def test_word_errors_by_hand(heard: str, spoken: str, errors: int) -> None:
    assert metrics.word_errors(heard.split(), spoken.split()) == errors


def test_case_punctuation_and_spaces_are_not_heard() -> None:
    assert metrics.spoken_words("  “Don't” —\tshe said; WELL-known…\n") == ["dont", "she", "said", "well", "known"]
    assert metrics.spoken_words("Ein Pfund kostet £3") == ["ein", "pfund", "kostet", "£3"]
    assert metrics.spoken_words("?!") == []


def test_gains_of_rankings_are_those_of_each_query_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for documents, k in ((30, 10), (6, 10), (12, 1)):
        scores = draw.integers(0, 8, (9, documents)).astype(float)  # with ties
        grades = draw.integers(-1, 4, (9, documents)) * (draw.random((9, documents)) < 0.3)
        grades[4] = -np.abs(grades[4])
        found = []
        for own, judged in zip(scores.tolist(), grades.tolist(), strict=True):
            order = sorted(range(documents), key=lambda place: (-own[place], place))
            gains = [max(judged[place], 0) for place in order]
            sums = [
                sum(gain / np.log2(rank + 1) for rank, gain in enumerate(ranked[:k], 1))
                for ranked in (gains, sorted(gains, reverse=True))
            ]
            if sums[1]:
                found.append(sums[0] / sums[1])
        assert metrics.ndcg(scores, grades, k) == pytest.approx(np.mean(found))


def test_gains_of_rankings_by_hand() -> None:
    scores, grades = np.array([[0.9, 0.5, 0.7]]), np.array([[0, 1, 3]])
    best = 3 / np.log2(2) + 1 / np.log2(3)
    assert metrics.ndcg(scores, grades) == pytest.approx((3 / np.log2(3) + 1 / np.log2(4)) / best)
    assert metrics.ndcg(scores, grades, 1) == 0.0
    assert metrics.ndcg(grades.astype(float), grades) == 1.0
    assert metrics.ndcg(scores, np.zeros_like(grades)) == 0.0


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

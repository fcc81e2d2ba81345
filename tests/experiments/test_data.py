"""Windows of text that never overlap, and the digits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from experiments.data import Text, load_digits, load_text, text_tokens, token_windows


class Words:
  """A tokenizer whose tokens are the numbers in the text, so that a window shows where it is from."""

  cls_token_id = None
  sep_token_id = None

  def __call__(self, text, **options):
    assert options["add_special_tokens"] is False
    return {"input_ids": [int(word) for word in text.split()]}


class Marked(Words):
  cls_token_id = 1001
  sep_token_id = 1002


TEXT = Text(" ".join(map(str, range(100))), "", "numbers")


def test_calibration_from_the_beginning_evaluation_from_the_end():
  assert token_windows(Words(), TEXT, 2, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
  last = token_windows(Words(), TEXT, 2, 5, "evaluation")
  assert last.tolist() == [[90, 91, 92, 93, 94], [95, 96, 97, 98, 99]]
  assert last.dtype == np.int32


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(("samples", "tokens"), [(10, 5), (7, 7), (1, 50), (50, 1), (3, 11)])
def test_windows_never_overlap(seed, samples, tokens):
  parts = [token_windows(Words(), TEXT, samples, tokens, part, seed=seed) for part in ("calibration", "evaluation")]
  both = np.concatenate(parts)
  assert both.shape == (2 * samples, tokens)
  assert len(np.unique(both)) == both.size
  assert (np.diff(both, axis=1) == 1).all()
  assert parts[0].max() < 50 <= parts[1].min()
  again = token_windows(Words(), TEXT, samples, tokens, "evaluation", seed=seed)
  assert (again == parts[1]).all()


def test_seeds_choose_other_windows():
  found = [token_windows(Words(), TEXT, 3, 8, seed=seed).tolist() for seed in range(4)]
  assert len({str(f) for f in found}) == 4


def test_class_and_separator_tokens_stand_around_every_window():
  assert token_windows(Marked(), TEXT, 2, 5).tolist() == [[1001, 0, 1, 2, 1002], [1001, 3, 4, 5, 1002]]


def test_too_short_a_text_and_other_mistakes():
  with pytest.raises(
    ValueError, match=r"6 windows of 9 tokens of text are 54, but the calibration part of this text has 50 of its 100 tokens"
  ):
    token_windows(Words(), TEXT, 6, 9)
  assert token_windows(Words(), TEXT, 6, 9, calibration_share=0.54).shape == (6, 9)
  with pytest.raises(ValueError, match="the evaluation part of this text has 46 of its 100"):
    token_windows(Words(), TEXT, 6, 9, "evaluation", calibration_share=0.54)
  with pytest.raises(ValueError, match="part 'test' is unknown; allowed are 'calibration', 'evaluation'"):
    token_windows(Words(), TEXT, 1, 1, "test")
  with pytest.raises(ValueError, match="samples 0 and tokens 5 must be at least 1 and 1"):
    token_windows(Words(), TEXT, 0, 5)
  with pytest.raises(ValueError, match="tokens 2 must be at least 1 and 3"):
    token_windows(Marked(), TEXT, 1, 2)
  with pytest.raises(ValueError, match=r"calibration_share 1.0 is outside"):
    token_windows(Words(), TEXT, 1, 1, calibration_share=1.0)


def test_texts(tmp_path):
  text = load_text()
  assert text.source == "python-docs" and len(text.text) > 300_000
  assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
  assert load_text() == text
  path = tmp_path / "mine.txt"
  path.write_text("3 4 5 ü".replace("ü", "6"), encoding="utf-8")
  mine = load_text(text_file=path)
  assert mine.source == str(path) and text_tokens(Words(), mine).tolist() == [3, 4, 5, 6]
  with pytest.raises(ValueError, match="text source 'wikitext' is unknown; allowed are 'python-docs'"):
    load_text("wikitext")
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="is not UTF-8"):
    load_text(text_file=path)
  path.write_text(" \n")
  with pytest.raises(ValueError, match="is empty"):
    load_text(text_file=path)
  with pytest.raises(FileNotFoundError):
    load_text(text_file=tmp_path / "none.txt")


def test_digits():
  nhwc, nchw = load_digits(), load_digits("NCHW")
  assert nhwc.train_images.shape == (1438, 8, 8, 1) and nhwc.test_images.shape == (359, 8, 8, 1)
  assert nchw.train_images.shape == (1438, 1, 8, 8)
  assert (nchw.test_images[:, 0] == nhwc.test_images[..., 0]).all()
  assert nhwc.train_images.dtype == np.float32 and nhwc.train_labels.dtype == np.int32
  assert abs(nhwc.train_images.mean()) < 1e-6 and abs(nhwc.train_images.std() - 1) < 1e-6  # rounding of 92,032 float32 numbers
  assert set(nhwc.test_labels.tolist()) == set(range(10))
  assert not (load_digits(seed=1).test_labels == nhwc.test_labels).all()
  with pytest.raises(ValueError, match="layout 'HWC' is unknown"):
    load_digits("HWC")
  with pytest.raises(ValueError, match="test_share 0 is outside"):
    load_digits(test_share=0)

import json

import pytest

from sparsight.utils.head_scores import read_scores


@pytest.mark.parametrize("content", ["[]", "{}", '{"scores": 3}', '{"scores": [["a"]]}', "heads"])
def test_files_without_scores_are_refused(content, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"heads.json holds no head scores: `sparsight calibrate` writes"):
        read_scores(path)
    with pytest.raises(ValueError, match="There is no file"):
        read_scores(tmp_path / "none.json")


def test_scores_survive_their_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"scores": [[0.5, 1], [2, 3.25]]}))
    assert read_scores(path) == ((0.5, 1.0), (2.0, 3.25))

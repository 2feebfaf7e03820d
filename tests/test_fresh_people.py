"""Who is in a pair is not fresh."""

import pandas as pd
import pytest

from bench import fresh_people


def test_who_is_in_no_pair_is_left(tmp_path, capsys):
    people = pd.DataFrame({"name": list("ABCDEF"), "superset": ["artist"] * 3 + ["writer"] * 3, "century": ""})
    people.to_csv(tmp_path / "people.csv", index=False)
    pd.DataFrame({"name": ["F"]}).to_csv(tmp_path / "seen.csv", index=False)
    results = tmp_path / "results"
    results.mkdir()
    pd.DataFrame({"pair_id": ["p"], "clean_a": ["A"], "corrupt_b": ["D"], "margin": [1.0]}).to_parquet(
        results / "pairs.parquet"
    )
    pd.DataFrame({"clean_a": ["E"]}).to_parquet(results / "baselines.unselected.parquet")
    files = [f"--{key}={tmp_path / file}" for key, file in
             (("people", "people.csv"), ("seen", "seen.csv"), ("out", "fresh.csv"))]  # fmt: skip
    fresh_people.main([str(results), *files])
    assert pd.read_csv(tmp_path / "fresh.csv")["name"].tolist() == ["B", "C"]
    assert (tmp_path / "fresh.csv").read_text().splitlines()[0] == "name,superset,century"
    assert "2 of 6 people are in none of these pairs: 2 artists" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    pd.DataFrame({"clean_b": ["B"]}).to_parquet(other / "pairs.parquet")
    pd.DataFrame({"clean_b": ["C"]}).to_parquet(other / "placebo.parquet")
    fresh_people.main([str(results), "--quads", str(other), *files])
    assert pd.read_csv(tmp_path / "fresh.csv")["name"].tolist() == ["C"]
    with pytest.raises(SystemExit, match=r"has no pairs\.parquet"):
        fresh_people.main([str(tmp_path), *files])

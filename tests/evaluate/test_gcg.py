import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.gcg_naive import naive_gcg
from deepalign.data.chat import prompt_token_ids
from deepalign.evaluate import gcg_loss
from deepalign.evaluate.gcg import GcgSettings, SuffixSearch, mean_and_sd, optimise_suffix
from deepalign.evaluate.gcg_attack import gcg_attack, open_records, weights_fingerprint
from deepalign.evaluate.gcg_loss import TargetLoss
from deepalign.evaluate.gcg_prompt import SuffixPrompt, allowed_tokens, suffix_text, with_suffix
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.outcomes import AttackExample
from deepalign.kernels.contrastive_sample.reference import contrastive_logits
from tests.tiny import TEMPLATE, make_model, make_tokenizer

EXAMPLES = [AttackExample("w1 w2 w3", "w20 w21 w22"), AttackExample("w4", "w30 w31 w32 w33")]
SETTINGS = GcgSettings(steps=8, width=24, top_k=6, suffix_tokens=5, initial_token="w9", batch_size=7, early_stop=False)


def settings(**changes):
    return GcgSettings(**{**SETTINGS.__dict__, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(3, tokenizer).double().eval()


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_model(4, tokenizer).double().eval()


@pytest.mark.parametrize("examples", [EXAMPLES[:1], EXAMPLES], ids=["individual", "universal"])
def test_losses_equal_the_naive_implementations_step_by_step(model, tokenizer, examples):
    for seed in (0, 1):
        expected, suffix = naive_gcg(model, tokenizer, examples, SETTINGS, seed=seed)
        search = SuffixSearch(model, tokenizer, examples, SETTINGS, seed=seed)
        found = search.run(progress=False)
        assert found.losses == pytest.approx(expected, rel=1e-6)
        assert search.suffix_S.tolist() == suffix
        assert found.loss == min(found.losses)
        assert found.stopped == "steps"
        assert found.sequences == len(examples) * (8 + sum(found.candidates))
        assert min(expected) < expected[0], "the search gets somewhere"


def candidates_of_every_place(rows, length):
    """Suffixes that differ from the present one from place 0, 1, ... on, mixed; one of them is the present one."""
    generator = torch.Generator().manual_seed(0)
    present = torch.randint(6, 46, (length,), generator=generator)
    suffixes = torch.randint(6, 46, (rows, length), generator=generator)
    for row in range(rows):
        suffixes[row, : row % (length + 1)] = present[: row % (length + 1)]
    return suffixes, present


@pytest.mark.parametrize("contrast", [None, ("logits", 1.5), ("logprobs", 0.7)])
def test_losses_are_the_cross_entropy_of_the_whole_sequence(model, base, tokenizer, contrast):
    before, after, target = [4, 7, 8], [2, 5], [20, 21, 22]
    pair = None if contrast is None else Contrast(base, contrast[1], contrast[0])
    suffixes, present = candidates_of_every_place(9, 4)
    measured = TargetLoss(model, before, after, target, suffix_length=4, rows=4, contrast=pair).candidates(
        suffixes, present
    )
    for row, suffix in enumerate(suffixes.tolist()):
        ids = torch.tensor([before + suffix + after + target])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -4:-1]
            if pair is not None:
                logits = contrastive_logits(
                    logits, base(input_ids=ids).logits[0, -4:-1], alpha=pair.alpha, space=pair.space
                )
        assert float(measured.loss[row]) == pytest.approx(float(functional.cross_entropy(logits, torch.tensor(target))))
        assert bool(measured.matched[row]) == (logits.argmax(-1).tolist() == target)


def cross_entropy_of_the_whole(model, before, suffix, after, target):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + suffix + after + target])).logits[0, -len(target) - 1 : -1]
    return float(functional.cross_entropy(logits, torch.tensor(target)))


@pytest.mark.parametrize("chunk_rows", [1, 5, 8])
def test_chunks_of_logits_change_nothing(model, base, tokenizer, monkeypatch, chunk_rows):
    before, after, target = [4, 7, 8], [2, 5], [20, 21, 22]
    suffixes, present = candidates_of_every_place(9, 4)
    for pair in (None, Contrast(base, 1.5)):
        whole = TargetLoss(model, before, after, target, suffix_length=4, rows=4, contrast=pair)
        expected = whole.candidates(suffixes, present)
        asked = []

        def fixed(rows, *arguments, asked=asked, **options):
            asked.append(rows)
            return chunk_rows

        with monkeypatch.context() as patch:
            patch.setattr(gcg_loss, "choose_chunk_rows", fixed)
            measured = whole.candidates(suffixes, present)
        assert asked == [4 * 3] * (1 if pair is None else 2)
        torch.testing.assert_close(measured.loss, expected.loss)
        assert measured.matched.tolist() == expected.matched.tolist()


def test_a_head_that_is_not_only_a_matrix(tokenizer):
    """One with a bias runs by the model's own logits; a softcap is part of the head."""
    biased = make_model(3, tokenizer).double().eval()
    torch.manual_seed(1)
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(48).double())
    config = Gemma2Config(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    softcapped = Gemma2ForCausalLM(config).double().eval()
    before, after, target = [4, 7, 8], [2, 5], [20, 21, 22]
    suffixes, present = candidates_of_every_place(6, 4)
    for model, known in ((biased, False), (softcapped, True)):
        loss = TargetLoss(model, before, after, target, suffix_length=4, rows=4)
        assert (loss.prefixes[0].head is not None) == known
        measured = loss.candidates(suffixes, present).loss.tolist()
        expected = [cross_entropy_of_the_whole(model, before, suffix, after, target) for suffix in suffixes.tolist()]
        assert measured == pytest.approx(expected, rel=1e-6)


def test_a_matched_target_is_the_greedy_answer(model, tokenizer):
    before, suffix, after = [4, 7, 8], [9, 10], [2, 5]
    ids = before + suffix + after
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = ids[-3:]
    wrong_end = [*greedy[:2], (greedy[2] + 1) % 46]
    for target, matched in ((greedy, True), (wrong_end, False)):
        loss = TargetLoss(model, before, after, target, suffix_length=2, rows=3)
        assert loss.candidates(torch.tensor([suffix]), torch.tensor(suffix)).matched.tolist() == [matched]


@pytest.mark.parametrize("contrast", [None, ("logits", 1.5), ("logprobs", 0.7)])
def test_the_gradient_is_that_of_the_one_hot_tokens(model, base, contrast):
    """Against a forward over a soft mixture of embeddings: d loss / d one-hot, by finite differences."""
    before, suffix, after, target = [4, 7, 8], [9, 10], [2, 5], [20, 21]
    pair = None if contrast is None else Contrast(base, contrast[1], contrast[0])
    loss, gradient_SV = TargetLoss(model, before, after, target, suffix_length=2, rows=3, contrast=pair).gradient(
        torch.tensor(suffix)
    )

    @torch.no_grad()
    def soft_loss(one_hot):
        logits = []
        for each in [model] if pair is None else [model, base]:
            weight = each.get_input_embeddings().weight
            parts = [weight[before], one_hot @ weight, weight[after + target]]
            logits.append(each(inputs_embeds=torch.cat(parts)[None]).logits[0, -3:-1])
        bent = logits[0] if pair is None else contrastive_logits(*logits, alpha=pair.alpha, space=pair.space)
        return functional.cross_entropy(bent, torch.tensor(target))

    one_hot = functional.one_hot(torch.tensor(suffix), 48).double()
    assert float(loss) == pytest.approx(float(soft_loss(one_hot)))
    step = 1e-3  # the models' norms round to fp32
    for place, token in [(0, 9), (0, 33), (1, 2), (1, 47), (1, 10)]:
        moved = torch.zeros_like(one_hot)
        moved[place, token] = step
        slope = (soft_loss(one_hot + moved) - soft_loss(one_hot - moved)) / (2 * step)
        assert float(gradient_SV[place, token]) == pytest.approx(float(slope), rel=1e-2, abs=1e-3)


def test_a_sliding_window_is_respected(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).double().eval()
    before, after, target = list(range(6, 16)), [2, 5], [20, 21]
    suffixes, present = candidates_of_every_place(5, 3)
    loss = TargetLoss(model, before, after, target, suffix_length=3, rows=4)
    for _ in range(2):  # a second call starts from the same prefix
        measured = loss.candidates(suffixes, present).loss
        for row, suffix in enumerate(suffixes.tolist()):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([before + suffix + after + target])).logits[0, -3:-1]
            expected = functional.cross_entropy(logits, torch.tensor(target))
            assert float(measured[row]) == pytest.approx(float(expected), rel=1e-6)


def test_candidates_change_one_place_to_one_of_its_best_tokens(model, tokenizer):
    search = SuffixSearch(model, tokenizer, EXAMPLES[:1], SETTINGS, seed=0)
    _, gradient = search.gradient()
    allowed = search.allowed_V.nonzero().flatten().tolist()
    best = [sorted(allowed, key=row.__getitem__)[:6] for row in gradient.tolist()]
    places = []
    for candidate in search.draw_candidates(gradient).tolist():
        changed = [place for place, id_ in enumerate(candidate) if id_ != search.suffix_S[place]]
        assert len(changed) <= 1
        places += changed
        assert all(candidate[place] in best[place] for place in changed)
    assert set(places) == set(range(5)), "every place is tried"


def bpe_tokenizer():
    """Here "a" before "b" merges: some suffixes of ids are not what their text is tokenised to."""
    vocab = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "Ġ": 5, "ab": 6, "Ġa": 7, "Ġb": 8, "é": 9}
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "b")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template=TEMPLATE.replace("<", "").replace(">", ""),
    )


@pytest.fixture(scope="module")
def merging():
    """A byte-level BPE without words: "ab" merges, a space belongs to the token behind it."""
    template = "{% for m in messages %}c{{ m.content }}c{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_only_suffixes_that_are_tokenised_to_themselves_survive(merging):
    prompt = SuffixPrompt(merging, "cb", " a b a")
    assert (prompt.before_ids, prompt.initial_ids, prompt.after_ids) == ([4, 4, 3], [7, 8, 7], [4, 2])
    candidates = {
        (7, 8, 7): True,  # " a b a"
        (7, 2, 4): True,  # " aac"
        (7, 3, 4): False,  # " ab" is one merge away from other ids
        (2, 8, 7): False,  # "a b a": typed behind a request it begins with a space
        (8, 6, 4): True,  # " babc"
        (8, 2, 3): False,  # " bab": the last two are one token
        (7, 8, 5): False,  # ends in a space: a template may strip it
    }
    assert prompt.surviving(list(candidates)) == list(candidates.values())
    for ids, survives in candidates.items():
        whole = merging(f"c{with_suffix('cb', suffix_text(merging, ids))}ca")["input_ids"]
        if survives:
            assert whole == [4, 4, 3, *ids, 4, 2]


def test_the_filter_is_applied(merging):
    model = make_model(0, merging).eval()
    options = settings(initial_token="a", suffix_tokens=3, width=30, steps=4, ascii_only=True)
    search = SuffixSearch(model, merging, [AttackExample("cb", "cc")], options, seed=0)
    found = search.run(progress=False)
    assert all(0 < count < 30 for count in found.candidates)
    assert merging(f"c{with_suffix('cb', found.suffix)}ca")["input_ids"] == [4, 4, 3, *found.suffix_ids, 4, 2]


def test_tokens_of_a_suffix_have_a_text_and_are_not_special(merging, tokenizer):
    assert allowed_tokens(merging, 12, ascii_only=True).nonzero().flatten().tolist() == [2, 3, 4, 6, 7, 8]
    words = allowed_tokens(tokenizer, 48, ascii_only=True).nonzero().flatten().tolist()
    assert words == [3, 4, 5, *range(6, 46)], "all but pad, unk and end; not the two padding entries of the logits"


def test_the_same_seed_gives_the_same_search(model, tokenizer):
    first, second, other = (
        optimise_suffix(model, tokenizer, EXAMPLES[:1], SETTINGS, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.losses == second.losses
    assert first.suffix_ids == second.suffix_ids
    assert first.losses != other.losses


def test_the_search_stops_early(model, tokenizer):
    """The target is what the model says anyway, so that it is matched soon."""
    prompt = SuffixPrompt(tokenizer, "w1", " ".join(["w9"] * 5))
    ids = prompt.before_ids + prompt.initial_ids + prompt.after_ids
    with torch.no_grad():
        likely = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    example = AttackExample("w1", tokenizer.decode([likely]))
    found = optimise_suffix(model, tokenizer, [example], settings(early_stop=True), progress=False)
    assert (found.stopped, found.matched) == ("matched", True)
    assert len(found.losses) < 8

    asked = []

    def never(suffix_ids):
        asked.append(suffix_ids)
        return False

    found = optimise_suffix(
        model, tokenizer, [example], settings(early_stop=True, check_every=3), succeeded=never, progress=False
    )
    assert (found.stopped, len(found.losses)) == ("steps", 8)
    assert len(asked) == 3, "at most every third step"
    assert optimise_suffix(model, tokenizer, [example], settings(stop_loss=100.0), progress=False).stopped == "loss"


def test_budgets_end_the_search(model, tokenizer):
    found = optimise_suffix(model, tokenizer, EXAMPLES[:1], settings(max_sequences=60), progress=False)
    assert (found.stopped, len(found.losses)) == ("sequences", 2)
    assert found.sequences <= 60
    found = optimise_suffix(model, tokenizer, EXAMPLES[:1], settings(max_seconds=1e-9), progress=False)
    assert (found.stopped, found.losses) == ("seconds", [])
    assert math.isinf(found.loss)


def test_mean_and_deviation_are_the_papers():
    """Four zeros and one of 2 percent: "0.4 +- 0.9"."""
    mean, sd = mean_and_sd([0.0, 0.0, 0.0, 0.0, 2.0])
    assert (round(mean, 1), round(sd, 1)) == (0.4, 0.9)
    assert math.isnan(mean_and_sd([1.0])[1])
    with pytest.raises(ValueError, match="no values"):
        mean_and_sd([])


# ---- the attack ----


def judge(example, prefix, continuation):
    words = continuation.split()
    return "harmful" if "w20" in words else "refused" if "w21" in words else "degenerate"


def run_attack(model, tokenizer, **options):
    defaults = {"settings": settings(steps=3, early_stop=True), "seeds": (0, 1), "max_new_tokens": 4, "judge": judge}
    return gcg_attack(model, tokenizer, EXAMPLES, progress=False, **{**defaults, **options})


def without_times(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("universal", [False, True])
def test_answers_are_greedy_answers_to_the_request_with_its_suffix(model, tokenizer, universal):
    result = run_attack(model, tokenizer, universal_on=EXAMPLES if universal else None)
    assert [(r["seed"], r["index"]) for r in result.records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for record in result.records:
        ids = prompt_token_ids(tokenizer, f"{record['prompt']} {record['suffix']}")
        with torch.no_grad():
            for _ in range(4):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        answer = [id_ for id_ in ids[-4:] if id_ != tokenizer.eos_token_id]
        assert record["continuation"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert record["outcome"] == judge(None, "", record["continuation"])
    for seed in (0, 1):
        outcomes = [r["outcome"] for r in result.records if r["seed"] == seed]
        assert result.counts[seed] == {
            **{name: outcomes.count(name) for name in ("harmful", "refused", "degenerate")}, "n": 2,
        }  # fmt: skip
    assert result.rate == mean_and_sd([result.counts[seed]["harmful"] / 2 for seed in (0, 1)])
    same = {r["suffix"] for r in result.records if r["seed"] == 0}
    assert (len(same) == 1) == universal


@pytest.mark.parametrize("universal", [False, True])
def test_an_interrupted_attack_goes_on_and_loses_nothing(model, tokenizer, tmp_path, universal):
    options = {"universal_on": EXAMPLES[:1] if universal else None}
    whole = run_attack(model, tokenizer, out=tmp_path / "whole.jsonl", **options)
    text = (tmp_path / "whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:2]) + lines[2][:20])  # one answer, and half of the next
    resumed = run_attack(model, tokenizer, out=cut, **options)
    assert without_times(resumed.records) == without_times(whole.records)
    assert resumed.counts == whole.counts
    assert cut.read_text().splitlines()[1] == lines[1].strip(), "what was there is kept as it was"
    before = cut.read_text()
    again = run_attack(model, tokenizer, out=cut, **options)
    assert again == resumed
    assert cut.read_text() == before
    more = run_attack(model, tokenizer, out=cut, seeds=(1, 2), **options)
    assert list(more.counts) == [1, 2]
    assert len(cut.read_text().splitlines()) == 1 + 6


def test_a_file_of_another_attack_is_refused(model, base, tokenizer, tmp_path):
    run_attack(model, tokenizer, out=tmp_path / "a.jsonl", seeds=(0,))
    with pytest.raises(ValueError, match=r"another attack \(different: settings\)"):
        run_attack(model, tokenizer, out=tmp_path / "a.jsonl", settings=settings(steps=2))
    with pytest.raises(ValueError, match=r"different: model"):
        run_attack(base, tokenizer, out=tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    for content, problem in (("a report", "holds no attack's results"), ("{}\n[]\n", r"a\.jsonl:2 is no JSON object")):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=problem):
            run_attack(model, tokenizer, out=tmp_path / "a.jsonl")
        assert (tmp_path / "a.jsonl").read_text() == content


def test_a_second_process_is_kept_out_and_half_a_first_line_starts_again(model, tokenizer, tmp_path):
    file, identity = tmp_path / "a.jsonl", {"settings": 1}
    file.write_bytes(b'{"set')
    with open_records(file, identity) as records:
        with pytest.raises(ValueError, match=r"a\.jsonl is being written by another process; wait"):
            run_attack(model, tokenizer, out=file)
        records.add({"seed": 0, "index": 0})
    with open_records(file, identity) as records:
        assert records.done == {(0, 0): {"seed": 0, "index": 0}}


def test_a_contrastive_pair_is_attacked_and_answers_as_one(model, base, tokenizer):
    contrast = Contrast(base, 2.0)
    plain, pair = (run_attack(model, tokenizer, seeds=(0,), contrast=c) for c in (None, contrast))
    assert plain.records[0]["suffix_ids"] != pair.records[0]["suffix_ids"]
    record = pair.records[0]
    ids = prompt_token_ids(tokenizer, f"{record['prompt']} {record['suffix']}")
    with torch.no_grad():
        logits = [each(input_ids=torch.tensor([ids])).logits[0, -1] for each in (model, base)]
    first = int(contrastive_logits(*logits, alpha=2.0).argmax())
    assert record["continuation"].split()[0] == tokenizer.decode([first])


def test_models_have_different_fingerprints(model, base):
    assert weights_fingerprint(model) != weights_fingerprint(base)
    assert weights_fingerprint(model) == weights_fingerprint(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_token": "unknown"}, "'unknown' is no token that a suffix may be made of"),
        ({"initial_token": "w1 w2"}, "5 times 'w1 w2' are 10 tokens"),
        ({"target_tokens": 60, "suffix_tokens": 60}, "context of 64"),
    ],
)
def test_bad_searches_are_refused(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        optimise_suffix(model, tokenizer, EXAMPLES, settings(**changes), progress=False)


def test_bad_input_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="examples is empty"):
        optimise_suffix(model, tokenizer, [], SETTINGS)
    with pytest.raises(ValueError, match="has no tokens"):
        optimise_suffix(model, tokenizer, [AttackExample("w1", " ")], SETTINGS)
    with pytest.raises(ValueError, match=r"model\.eval"):
        optimise_suffix(make_model(0, tokenizer), tokenizer, EXAMPLES, SETTINGS)
    with pytest.raises(ValueError, match="distinct seeds"):
        run_attack(model, tokenizer, seeds=(1, 1))
    with pytest.raises(ValueError, match="the judge must return one of"):
        run_attack(model, tokenizer, judge=lambda *a: "unsafe")
    for name, value in (("steps", 0), ("max_seconds", 0), ("initial_token", " ")):
        with pytest.raises(ValueError, match=name):
            settings(**{name: value})


def test_a_model_that_overflows_is_named(tokenizer):
    broken = make_model(3, tokenizer).eval()
    with torch.no_grad():
        broken.lm_head.weight[30:].fill_(math.inf)
    with pytest.raises(RuntimeError, match="is not finite"):
        optimise_suffix(broken, tokenizer, EXAMPLES[:1], SETTINGS, progress=False)


def test_records_are_json_lines(model, tokenizer, tmp_path):
    run_attack(model, tokenizer, out=tmp_path / "a.jsonl", seeds=(0,))
    header, *records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert header["settings"]["steps"] == 3
    assert {"seed", "index", "prompt", "suffix", "loss", "steps", "stopped", "continuation", "outcome"} <= records[
        0
    ].keys()

"""The same network as everyone else's GPT-2, cached or not, alone or in a batch."""

import json

import pytest
import torch
import transformers

from nanorlhf import reward
from nanorlhf.model import GPT, GPTConfig, KVCache, ScalarGPT
from nanorlhf.support import UserError, checkpoint

TINY = GPTConfig(vocab_size=17, n_positions=12, n_layer=2, n_head=4, n_embd=16)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randint(17, (3, 10))


def scrambled(model):
    """Every weight random, biases and LayerNorms too, so that none can be left out unnoticed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for w in model.parameters():
            w += 0.3 * torch.randn_like(w)
    return model.eval()


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol)


# --- shapes ---


def test_one_trunk_two_heads(tokens):
    gpt, scalar = GPT(TINY), ScalarGPT(TINY)
    assert gpt(tokens).shape == (3, 10, 17)
    assert scalar(tokens).shape == (3, 10)
    assert gpt.transformer(tokens).shape == (3, 10, 16)


def test_embeddings_are_tied():
    names = {name for name, _ in GPT(TINY).named_parameters()}
    assert "transformer.wte.weight" in names and not any("lm_head" in name for name in names)


def test_a_model_says_what_it_is():
    assert str(GPT(TINY)) == "2 layers x 16, 0.01 M parameters, vocabulary 17"


# --- who is in the batch, and what stands behind, does not matter ---


def test_padding_and_batch_mates_change_nothing(tokens):
    for model in scrambled(GPT(TINY)), scrambled(ScalarGPT(TINY)):
        together = model(tokens)
        assert close(model(tokens[1:2])[0], together[1])  # alone
        assert close(model(tokens[:, :6]), together[:, :6])  # without what follows
        padded = torch.cat([tokens[:, :6], torch.full((3, 5), 16)], dim=1)
        assert close(model(padded)[:, :6], together[:, :6])  # with padding in its place


def test_position_counts(tokens):
    """Or the tests above would pass for a bag of words."""
    model = scrambled(GPT(TINY))
    assert not close(model(tokens.roll(1, dims=1))[:, -1], model(tokens)[:, -2], atol=1e-2)


def test_cached_equals_uncached(tokens):
    model = scrambled(GPT(TINY))
    whole = model.transformer(tokens)
    cache = KVCache(TINY, B=3, S=12, device="cpu", dtype=torch.float32)
    positions = torch.arange(10).expand(3, 10)
    parts = [
        model.transformer(tokens[:, at], cache, positions[:, at])
        for at in (slice(0, 6), slice(6, 7), slice(7, 10))
    ]
    assert close(torch.cat(parts, dim=1), whole)


def test_each_row_may_write_the_cache_at_its_own_position(tokens):
    """Rows of 2, 6 and 4 tokens, prefilled together, padding and all; then one token each."""
    model, lengths = scrambled(GPT(TINY)), torch.tensor([2, 6, 4])
    cache = KVCache(TINY, B=3, S=12, device="cpu", dtype=torch.float32)
    model.transformer(tokens[:, :6], cache, torch.arange(6).expand(3, 6))
    following = torch.tensor([[7], [8], [9]])
    out = model.transformer(following, cache, lengths[:, None])
    for row, n in enumerate(lengths.tolist()):
        alone = torch.cat([tokens[row, :n], following[row]])[None]
        assert close(out[row, 0], model.transformer(alone)[0, n])


# --- dropout ---


def test_dropout_acts_in_training_only(tokens):
    model = GPT(GPTConfig(17, 12, 2, 4, 16, dropout=0.5))
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


# --- transformers' GPT-2 is the trusted twin ---


def theirs(tmp_path, architecture=transformers.GPT2LMHeadModel, **more):
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=12, n_layer=2, n_head=4, n_embd=16, bos_token_id=0,
        eos_token_id=0, **more,
    )  # fmt: skip
    model = scrambled(architecture(config))
    model.save_pretrained(tmp_path)
    return model


def test_their_weights_give_the_same_logits_here(tmp_path, tokens):
    model = theirs(tmp_path)
    ours = GPT.load(tmp_path)
    assert ours.config == TINY and not ours.training
    with torch.no_grad():
        assert close(ours(tokens), model(tokens).logits, atol=1e-4)


def test_our_weights_give_the_same_logits_there(tmp_path, tokens):
    model = scrambled(GPT(TINY))
    model.save(tmp_path)
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert close(opened(tokens).logits, model(tokens), atol=1e-4)


def test_a_reward_model_gives_the_same_score_there(tmp_path, tokens):
    model = scrambled(ScalarGPT(TINY))
    model.save(tmp_path, reward_mean=0.5)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert opened.num_labels == 1
    opened.config.pad_token_id = 99  # no token: the last one is the last one
    with torch.no_grad():
        assert close(opened(tokens).logits[:, 0], model(tokens)[:, -1], atol=1e-4)
        assert torch.equal(reward.load(tmp_path)(tokens), model(tokens))


def test_their_reward_model_gives_the_same_score_here(tmp_path, tokens):
    architecture = transformers.GPT2ForSequenceClassification
    model = theirs(tmp_path, architecture, num_labels=1, pad_token_id=16)
    tokens = tokens % 16
    with torch.no_grad():
        assert close(ScalarGPT.load(tmp_path)(tokens)[:, -1], model(tokens).logits[:, 0], atol=1e-4)


def test_gpt2_as_published_has_no_prefix_and_carries_masks_along(tmp_path, tokens):
    """The oldest files name the trunk's weights without "transformer." and store causal masks."""
    model = scrambled(GPT(TINY))
    model.save(tmp_path)
    config, tensors = checkpoint.load(tmp_path)
    old = {name.removeprefix("transformer."): w for name, w in tensors.items()}
    checkpoint.save(tmp_path, config, old | {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril()})
    assert torch.equal(GPT.load(tmp_path)(tokens), model(tokens))


# --- our own files ---


def test_the_longest_sequence_stands_in_config_json_under_both_of_its_names(tmp_path):
    """transformers reads n_positions, and llama.cpp's converter to GGUF the older n_ctx."""
    GPT(TINY).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_positions"] == config["n_ctx"] == 12


def test_what_is_saved_comes_back_to_the_bit(tmp_path, tokens):
    for model in scrambled(GPT(TINY)), scrambled(ScalarGPT(TINY)):
        model.save(tmp_path / model.architecture, note="kept")
        again = type(model).load(tmp_path / model.architecture)
        assert torch.equal(again(tokens), model(tokens))
        config = json.loads((tmp_path / model.architecture / "config.json").read_text())
        assert config["note"] == "kept" and config["architectures"] == [model.architecture]


def test_a_reward_model_begins_with_the_language_models_trunk(tmp_path, tokens):
    gpt = scrambled(GPT(TINY))
    gpt.save(tmp_path)
    scalar = ScalarGPT.load(tmp_path)
    assert torch.equal(scalar.transformer(tokens), gpt.transformer(tokens))
    assert scalar.score.weight.std() > 0  # a head of its own


def test_dropout_is_asked_for_anew_at_every_load(tmp_path):
    GPT(GPTConfig(17, 12, 2, 4, 16, dropout=0.5)).save(tmp_path)
    assert GPT.load(tmp_path).config.dropout == 0
    assert GPT.load(tmp_path, dropout=0.1).config.dropout == 0.1


# --- what is no GPT-2 is refused in a sentence ---


def test_heads_that_do_not_share_the_channels_evenly():
    with pytest.raises(UserError, match="n_head must divide n_embd, came 3 and 16"):
        GPTConfig(vocab_size=17, n_positions=12, n_layer=2, n_head=3, n_embd=16)


def damage(folder, config=(), without=(), **replaced):
    """A saved model, and then what somebody may have done to it."""
    GPT(TINY).save(folder)
    saved, tensors = checkpoint.load(folder)
    tensors = {name: w for name, w in tensors.items() if name not in without} | replaced
    checkpoint.save(folder, {k: v for k, v in {**saved, **dict(config)}.items() if v}, tensors)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere is no checkpoint"):
        GPT.load(tmp_path / "nowhere")


def test_a_config_of_another_family(tmp_path):
    damage(tmp_path, config={"n_embd": None})
    with pytest.raises(UserError, match="config.json: n_embd is None, expected 1 to"):
        GPT.load(tmp_path)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 0.01),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
    ],
)
def test_a_gpt2_that_computes_something_else(tmp_path, setting, value):
    GPT(TINY).save(tmp_path, **{setting: value})
    with pytest.raises(UserError, match=f"config.json: expected {setting} .*, came {value}"):
        GPT.load(tmp_path)


def test_a_gpt2_whose_head_is_another_matrix(tmp_path):
    theirs(tmp_path, transformers.GPT2LMHeadModel, tie_word_embeddings=False)
    with pytest.raises(UserError, match="expected a language head tied to the embedding"):
        GPT.load(tmp_path)


def test_a_weight_that_is_missing(tmp_path):
    damage(tmp_path, without=["transformer.h.1.mlp.c_fc.bias"])
    with pytest.raises(UserError, match="transformer.h.1.mlp.c_fc.bias, .*no such weight"):
        GPT.load(tmp_path)


def test_a_weight_of_another_shape(tmp_path):
    damage(tmp_path, **{"transformer.wpe.weight": torch.zeros(5, 16)})
    with pytest.raises(UserError, match=r"config.json\'s .*wpe.weight, \(12, 16\), came \(5, 16\)"):
        GPT.load(tmp_path)


def test_a_reward_model_in_the_place_of_a_language_model_is_refused(tmp_path):
    ScalarGPT(TINY).save(tmp_path)
    with pytest.raises(UserError, match="expected a language model, came one with a scalar head"):
        GPT.load(tmp_path)
    ScalarGPT.load(tmp_path)  # where it belongs


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [-1, 2**70, 1.0, True, "16", [16]])
def test_a_size_that_is_none(tmp_path, name, value):
    damage(tmp_path, config={name: value})
    with pytest.raises(UserError, match=f"config.json: {name} is .*, expected 1 to "):
        GPT.load(tmp_path)


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd"])
def test_a_size_beyond_all_memory_is_refused_before_any_is_taken(tmp_path, name):
    damage(tmp_path, config={name: 2**24})
    with pytest.raises(UserError, match=f"expected config.json's .*{2**24}"):
        GPT.load(tmp_path)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path):
    damage(tmp_path, config={"n_layer": 10**9})
    with pytest.raises(UserError, match="n_layer is 1000000000, expected 1 to 28"):
        GPT.load(tmp_path)


def test_a_matrix_that_is_none(tmp_path):
    damage(tmp_path, **{"transformer.h.0.mlp.c_fc.weight": torch.zeros(4, 2, 2)})
    with pytest.raises(UserError, match=r"c_fc.weight, \(64, 16\), came \(4, 2, 2\)"):
        GPT.load(tmp_path)


def test_checking_a_folder_throws_no_dice(tmp_path):
    """What is drawn after loading is what it was before folders were checked."""
    GPT(TINY).save(tmp_path)
    torch.manual_seed(0)
    GPT(TINY)
    expected = torch.rand(3)
    torch.manual_seed(0)
    GPT.load(tmp_path)
    assert torch.rand(3).equal(expected)


def test_a_reward_model_without_its_head_is_refused_where_a_fresh_one_will_not_do(tmp_path):
    GPT(TINY).save(tmp_path)
    with pytest.raises(UserError, match="a reward model's score.weight, .* no such weight"):
        reward.load(tmp_path)

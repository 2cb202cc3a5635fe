"""Plant defects, one at a time in a copy of the repository, and show which test notices each.

    python tests/mutants.py                 all of them
    python tests/mutants.py k3 whitening    those whose name contains one of these
    python tests/mutants.py --list          their names

A defect is caught if a test fails with it that passes without it. A test that cannot even be
collected has noticed nothing: then the mutant is broken, and has to be mended here.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    name: str
    pitfall: int  # its number in the table of tests/README.md; 0: not there
    file: str
    old: str  # occurs there exactly once
    new: str
    test: str  # in tests/: the one that should notice

    def text(self):
        """The file with the defect in it."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        assert found == 1, f"{self.name}: the code has moved, {self.old!r} occurs {found} times"
        return text.replace(self.old, self.new)


# fmt: off
MUTANTS = [
    # --- log-probs, KL, means ---
    Mutant("k3 with its arguments reversed", 33, "nanorlhf/logprobs.py",
           "d = (ref_logprobs - logprobs)", "d = (logprobs - ref_logprobs)",
           "test_logprobs.py::test_k1_and_k3_are_right_on_average"),
    Mutant("k1 with its sign reversed", 33, "nanorlhf/logprobs.py",
           "return logprobs - ref_logprobs", "return ref_logprobs - logprobs",
           "test_logprobs.py::test_k1_and_k3_are_right_on_average"),
    Mutant("k2 without its half", 34, "nanorlhf/logprobs.py",
           "(logprobs - ref_logprobs) ** 2 / 2", "(logprobs - ref_logprobs) ** 2",
           "test_logprobs.py::test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_has_none"),
    Mutant("k3 that overflows", 35, "nanorlhf/logprobs.py",
           ".clamp(max=20)", "",
           "test_logprobs.py::test_k3_does_not_overflow"),
    Mutant("k3 that loses the digits of a small gap", 35, "nanorlhf/logprobs.py",
           "d.expm1() - d", "d.exp() - 1 - d",
           "test_logprobs.py::test_k3_is_never_negative_however_small_the_gap"),
    Mutant("whitening that keeps the mean", 23, "nanorlhf/logprobs.py",
           "whitened if shift_mean else", "whitened if not shift_mean else",
           "test_logprobs.py::test_whiten_by_hand"),
    Mutant("whitening row by row", 24, "nanorlhf/logprobs.py",
           "mean = masked_mean(x, mask)",
           "mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)",
           "test_logprobs.py::test_whiten_by_hand"),
    Mutant("whitening by the unbiased variance", 24, "nanorlhf/logprobs.py",
           "masked_mean((x - mean) ** 2, mask)", "x[mask.bool()].var()",
           "test_logprobs.py::test_whiten_by_hand"),
    Mutant("whitening by the moments of the padding too", 24, "nanorlhf/logprobs.py",
           "mean = masked_mean(x, mask)", "mean = x.mean()",
           "test_logprobs.py::test_what_stands_behind_the_mask_cannot_change_what_is_whitened"),
    Mutant("a mean over the padding too", 31, "nanorlhf/logprobs.py",
           "masked(x, mask).sum() / mask.sum().clamp(min=1)", "x.float().mean()",
           "test_logprobs.py::test_masked_mean_counts_tokens_and_not_rows"),
    Mutant("a mean of the means of the rows", 28, "nanorlhf/logprobs.py",
           "masked(x, mask).sum() / mask.sum().clamp(min=1)",
           "((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()",
           "test_logprobs.py::test_masked_mean_counts_tokens_and_not_rows"),
    Mutant("garbage behind the mask that becomes NaN", 30, "nanorlhf/logprobs.py",
           "x.masked_fill(~mask.bool(), 0)", "x * mask",
           "test_ledger.py::test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("a window one position late", 4, "nanorlhf/logprobs.py",
           "at = prompt_len[:, None] - 1 +", "at = prompt_len[:, None] +",
           "test_logprobs.py::test_the_window_begins_one_before_the_response"),
    Mutant("response tokens one position early", 4, "nanorlhf/logprobs.py",
           "tokens, prompt_len + 1, R)", "tokens, prompt_len, R)",
           "test_logprobs.py::test_response_tokens_are_what_follows_the_prompt"),
    Mutant("no temperature anywhere", 13, "nanorlhf/logprobs.py",
           "return logits if temperature == 1 else logits / temperature", "return logits",
           "test_logprobs.py::test_temperature_divides_the_logits_once"),
    Mutant("a temperature that the scorer forgets", 13, "nanorlhf/logprobs.py",
           "return fast.rows_at_a_time(token_logprobs, logits, chosen, "
           "temperature=temperature)",
           "return fast.rows_at_a_time(token_logprobs, logits, chosen)",
           "test_logprobs.py::test_response_logprobs_equal_a_slow_loop_over_all_logits"),
    Mutant("a temperature that old log-probs forget", 13, "nanorlhf/logprobs.py",
           "return (fast.rows_at_a_time(token_logprobs, logits, chosen, "
           "temperature=temperature),",
           "return (fast.rows_at_a_time(token_logprobs, logits, chosen),",
           "test_logprobs.py::test_log_probs_and_entropies_of_one_pass_are_those_of_two"),
    Mutant("a temperature that the logged entropy forgets", 13, "nanorlhf/logprobs.py",
           "fast.rows_at_a_time(entropy, logits, temperature=temperature))",
           "fast.rows_at_a_time(entropy, logits))",
           "test_logprobs.py::test_log_probs_and_entropies_of_one_pass_are_those_of_two"),
    Mutant("a temperature applied twice", 13, "nanorlhf/logprobs.py",
           "tempered(logits, temperature).log_softmax(-1)\n"
           "    return logprobs.gather",
           "tempered(logits / temperature, temperature).log_softmax(-1)\n"
           "    return logprobs.gather",
           "test_logprobs.py::test_temperature_divides_the_logits_once"),
    Mutant("a temperature that the entropy forgets", 13, "nanorlhf/logprobs.py",
           "tempered(logits, temperature).log_softmax(-1)\n"
           "    return -(",
           "tempered(logits).log_softmax(-1)\n"
           "    return -(",
           "test_logprobs.py::test_temperature_divides_the_logits_once"),
    Mutant("a temperature that the gradient forgets", 13, "nanorlhf/support/fast.py",
           "torch.autograd.grad(ctx.function(x", "torch.autograd.grad(ctx.function.func(x",
           "test_fast.py::test_a_few_rows_at_a_time_say_and_learn_what_all_at_once_do"),
    Mutant("rows of logits and of their pushes cut differently", 0, "nanorlhf/support/fast.py",
           "zip(*(x.split(n) for x in (logits, *others)))",
           "zip(logits.split(n), *(x.split(max(1, n - 1)) for x in others))",
           "test_fast.py::test_a_few_rows_at_a_time_say_and_learn_what_all_at_once_do"),
    Mutant("a step that waits for the device", 0, "nanorlhf/support/fast.py",
           "        self.at += 1\n",
           "        self.at += 1\n"
           "        self.alive.any().item()\n",
           "test_fast.py::test_a_step_asks_the_device_nothing"),
    Mutant("entropy with its sign reversed", 31, "nanorlhf/logprobs.py",
           "return -(logprobs.exp() * logprobs)", "return (logprobs.exp() * logprobs)",
           "test_logprobs.py::test_entropy_by_hand"),
    Mutant("log-probs in half precision", 40, "nanorlhf/logprobs.py",
           "    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))\n", "",
           "test_logprobs.py::test_log_probs_are_float32_even_of_half_precision_logits"),

    # --- advantages ---
    Mutant("GAE that expects something after the end", 22, "nanorlhf/advantages.py",
           "torch.zeros_like(values[:, :1])", "values[:, -1:]",
           "test_advantages.py::test_gae_by_hand"),
    Mutant("GAE that expects what stands behind the mask", 22, "nanorlhf/advantages.py",
           "masked(rewards, mask), masked(values, mask)", "masked(rewards, mask), values",
           "test_advantages.py::test_nothing_is_expected_after_the_end"),
    Mutant("GAE that takes V of t for V of t + 1", 22, "nanorlhf/advantages.py",
           "torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)", "values",
           "test_advantages.py::test_gae_with_lambda_zero_looks_one_step_ahead"),
    Mutant("GAE that decays by lambda and not by gamma", 22, "nanorlhf/advantages.py",
           "gamma * lam * following", "lam * following",
           "test_advantages.py::test_gae_equals_its_double_sum"),
    Mutant("GAE that decays by gamma and not by lambda", 22, "nanorlhf/advantages.py",
           "gamma * lam * following", "gamma * following",
           "test_advantages.py::test_gae_by_hand"),
    Mutant("REINFORCE without a baseline", 0, "nanorlhf/advantages.py",
           "return scores - scores.mean()", "return scores",
           "test_advantages.py::test_reinforce_by_hand"),
    Mutant("RLOO whose baseline includes the response itself", 41, "nanorlhf/advantages.py",
           "baseline = (groups.sum(1, keepdim=True) - groups) / (G - 1)",
           "baseline = groups.mean(1, keepdim=True)",
           "test_advantages.py::test_the_baseline_of_rloo_does_not_know_the_response_it_judges"),
    Mutant("GRPO that is not centred", 41, "nanorlhf/advantages.py",
           "centred = groups - groups.mean(1, keepdim=True)", "centred = groups",
           "test_advantages.py::test_grpo_by_hand"),
    Mutant("GRPO by the deviation of the whole batch", 41, "nanorlhf/advantages.py",
           "groups.std(1, keepdim=True)", "groups.std()",
           "test_advantages.py::test_an_easy_prompt_is_no_merit_of_its_responses"),
    Mutant("a KL penalty that GRPO divides as well", 41, "nanorlhf/advantages.py",
           "grpo(scores, G) - rloo(penalty, G)", "grpo(scores - penalty, G)",
           "test_advantages.py::"
           "test_grpo_divides_the_scores_alone_so_a_penalty_weighs_what_its_coefficient_says"),
    Mutant("a KL penalty that GRPO forgets", 41, "nanorlhf/advantages.py",
           "grpo(scores, G) - rloo(penalty, G)", "grpo(scores, G)",
           "test_ppo.py::"
           "test_where_a_group_scores_alike_grpo_is_pushed_by_the_penalty_as_dear_as_it_is"),
    Mutant("a KL penalty that RLOO forgets", 41, "nanorlhf/advantages.py",
           "else rloo(scores - penalty, G)", "else rloo(scores, G)",
           "test_advantages.py::test_a_penalty_is_part_of_what_a_response_earns"),

    # --- the network ---
    Mutant("attention that sees one token of the future", 0, "nanorlhf/attention.py",
           ".tril()", ".tril(1)",
           "test_attention.py::test_a_causal_mask_looks_back_and_at_itself"),
    Mutant("attention without its scale", 0, "nanorlhf/attention.py",
           "(q / q.shape[-1] ** 0.5) @", "q @",
           "test_attention.py::test_attention_by_hand"),
    Mutant("a fused attention that is always given a mask", 0, "nanorlhf/attention.py",
           "attn_mask=mask, is_causal=mask is None)",
           "attn_mask=causal_mask(q.shape[2], q.device) if mask is None else mask)",
           "test_attention.py::test_without_a_mask_the_kernel_is_told_causal_and_given_none"),
    Mutant("a fused attention that may look ahead", 0, "nanorlhf/attention.py",
           "is_causal=mask is None)", "is_causal=False)",
           "test_attention.py::test_no_mask_is_a_causal_mask"),
    Mutant("a model that always makes a mask", 3, "nanorlhf/model.py",
           "self.training), None  ",
           "self.training), torch.ones(2 * tokens.shape[1:], device=x.device).bool().tril()  ",
           "test_attention.py::test_a_model_makes_a_mask_for_a_cache_alone"),
    Mutant("a cache that hides a token from itself", 3, "nanorlhf/model.py",
           "<= positions[:, None, :, None]", "< positions[:, None, :, None]",
           "test_model.py::test_cached_equals_uncached"),
    Mutant("the exact GELU", 43, "nanorlhf/model.py",
           ', approximate="tanh"', "",
           "test_model.py::test_their_weights_give_the_same_logits_here"),
    Mutant("a LayerNorm of another epsilon", 0, "nanorlhf/model.py",
           "self.ln_f = nn.LayerNorm(config.n_embd)",
           "self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-3)",
           "test_model.py::test_their_weights_give_the_same_logits_here"),
    Mutant("dropout that eval mode leaves on", 18, "nanorlhf/model.py",
           "F.dropout(self.c_proj(y), self.dropout, self.training)",
           "F.dropout(self.c_proj(y), self.dropout)",
           "test_model.py::test_dropout_acts_in_training_only"),
    Mutant("another activation's weights that load, and lie", 43, "nanorlhf/support/pretrained.py",
           "if config.get(name, value) != value:", "if False:",
           "test_model.py::test_a_gpt2_that_computes_something_else"),
    Mutant("a language head of its own that is left aside in silence", 0,
           "nanorlhf/support/pretrained.py",
           "not head.equal(embedding)", "False",
           "test_model.py::test_a_gpt2_whose_head_is_another_matrix"),
    Mutant("a scalar head that begins too large", 9, "nanorlhf/model.py",
           "std=(config.n_embd + 1) ** -0.5", "std=1.0",
           "test_ledger.py::test_a_fresh_head_says_numbers_of_the_order_of_one"),

    # --- generation ---
    Mutant("an end token outside the mask", 2, "nanorlhf/generate.py",
           "mask = ends.cumsum(1) == ends ", "mask = ends.cumsum(1) == 0 ",
           "test_generate.py::test_the_end_token_is_the_last_thing_inside_the_mask"),
    Mutant("a token after the end inside the mask", 8, "nanorlhf/generate.py",
           "mask = ends.cumsum(1) == ends ", "mask = ends.cumsum(1) <= 1 ",
           "test_generate.py::test_the_end_token_is_the_last_thing_inside_the_mask"),
    Mutant("responses that never stop", 16, "nanorlhf/generate.py",
           "ends = torch.zeros_like(response) if eos is None else (response == eos).long()",
           "ends = torch.zeros_like(response)",
           "test_generate.py::test_greedy_stops_where_the_uncached_loop_stops"),
    Mutant("an end forced at the limit and credited", 17, "nanorlhf/generate.py",
           "    response = response_tokens(tokens, prompt_len, R)",
           "    cut = ~(response_tokens(tokens, prompt_len, R) == eos).any(1)\n"
           "    tokens[cut, prompt_len[cut] + R - 1] = eos\n"
           "    response = response_tokens(tokens, prompt_len, R)",
           "test_ppo.py::test_the_mask_ends_with_the_end_token_or_with_the_limit"),
    Mutant("a cache written one place off", 3, "nanorlhf/support/fast.py",
           "self.cache, self.at[:, None])", "self.cache, self.at[:, None] + 1)",
           "test_generate.py::"
           "test_greedy_equals_the_uncached_loop_for_prompts_of_mixed_length"),
    Mutant("a first token that follows the padding", 3, "nanorlhf/generate.py",
           "hidden = hidden[group, prompt_len - 1]", "hidden = hidden[group, -1]",
           "test_generate.py::test_greedy_equals_the_uncached_loop_for_prompts_of_mixed_length"),
    Mutant("a sampler that keeps the likeliest eight", 14, "nanorlhf/generate.py",
           "    cumulative = tempered",
           "    floor = logits.topk(min(8, logits.shape[-1])).values[:, -1:]\n"
           "    logits = logits.masked_fill(logits < floor, float('-inf'))\n"
           "    cumulative = tempered",
           "test_generate.py"
           "::test_tokens_come_up_as_often_as_softmax_of_logits_over_temperature_says"),
    Mutant("a temperature that the sampler forgets", 13, "nanorlhf/generate.py",
           "tempered(logits, temperature)", "tempered(logits)",
           "test_generate.py"
           "::test_tokens_come_up_as_often_as_softmax_of_logits_over_temperature_says"),
    Mutant("a sampler that divides by the temperature again itself", 13, "nanorlhf/generate.py",
           "tempered(logits, temperature)", "(tempered(logits, temperature) / temperature)",
           "test_generate.py"
           "::test_tokens_come_up_as_often_as_softmax_of_logits_over_temperature_says"),
    Mutant("rows that go on after another row's prompt", 3, "nanorlhf/support/fast.py",
           "prompt_len - 1  ", "prompt_len.max().expand(len(tokens)) - 1  ",
           "test_generate.py::test_greedy_stops_where_the_uncached_loop_stops"),
    Mutant("rows that go on in the place of those that have ended", 0, "nanorlhf/support/fast.py",
           "self.rows, self.token, self.at = self.rows[rows],",
           "self.rows, self.token, self.at = self.rows[:rows.sum()],",
           "test_generate.py::test_greedy_stops_where_the_uncached_loop_stops"),
    Mutant("a cache that keeps rows which have ended", 0, "nanorlhf/model.py",
           "([x[rows] for x in cached]", "([x[:rows.sum()] for x in cached]",
           "test_generate.py::test_greedy_stops_where_the_uncached_loop_stops"),
    Mutant("rows that are dropped before they end", 0, "nanorlhf/support/fast.py",
           "decoder.keep(decoder.alive)",
           "decoder.keep(decoder.alive & (decoder.rows < decoder.rows[decoder.alive].max()))",
           "test_generate.py::test_greedy_stops_where_the_uncached_loop_stops"),
    Mutant("a sampler that may leave the vocabulary", 0, "nanorlhf/generate.py",
           "* cumulative[:, -1:]).squeeze", "* cumulative[:, -1:], right=True).squeeze",
           "test_generate.py::test_no_number_from_zero_to_one_leads_out_of_the_vocabulary"),
    Mutant("a sampler that draws the impossible", 0, "nanorlhf/generate.py",
           "return 1 - torch.rand(", "return torch.rand(",
           "test_generate.py::test_no_random_number_is_zero"),
    Mutant("a limit of rows that a large group breaks", 0, "nanorlhf/generate.py",
           "if 0 < batch_size < G:", "if False:",
           "test_generate.py"
           "::test_a_batch_has_as_many_rows_as_it_may_and_whole_groups_where_they_fit"),
    Mutant("a sampler that adds up in float32", 0, "nanorlhf/generate.py",
           ".cumsum(-1, dtype=u.dtype)", ".cumsum(-1).to(u.dtype)",
           "test_generate.py::"
           "test_a_token_less_likely_than_the_last_digit_of_float32_can_be_drawn"),
    Mutant("random numbers that are rounded to float32", 0, "nanorlhf/generate.py",
           'torch.float32 if device.type == "mps" else torch.float64', "torch.float32",
           "test_generate.py::"
           "test_the_random_numbers_keep_all_their_digits_on_the_way_to_the_sampler"),
    Mutant("random numbers that are drawn in float32", 0, "nanorlhf/generate.py",
           "torch.rand(*shape, dtype=torch.float64, generator=rng)",
           "torch.rand(*shape, generator=rng)",
           "test_generate.py::"
           "test_the_random_numbers_keep_all_their_digits_on_the_way_to_the_sampler"),
    Mutant("batches that all get the random numbers of the first", 0, "nanorlhf/generate.py",
           "uniforms[i:i + n].flatten(0, 1)", "uniforms[:len(prompts[i:i + n])].flatten(0, 1)",
           "test_generate.py::test_how_the_prompts_are_split_into_batches_changes_no_response"),
    Mutant("samples of a seed that depend on the run", 32, "nanorlhf/generate.py",
           "rng=torch.Generator().manual_seed(seed))", "rng=None)",
           "test_generate.py::"
           "test_texts_are_those_of_the_seed_and_leave_the_random_state_of_the_run_alone"),
    Mutant("decoding that stops at the first end", 0, "nanorlhf/support/fast.py",
           "if not decoder.alive.any():", "if not decoder.alive.all():",
           "test_fast.py::test_decode_writes_what_the_plain_loop_writes"),
    Mutant("a decode step that reads one position too few", 0, "nanorlhf/support/fast.py",
           "tokens.shape[1] - R + r ", "tokens.shape[1] - R + r - 1 ",
           "test_fast.py::test_decode_writes_what_the_plain_loop_writes"),
    Mutant("a graph that samples from the weights of an earlier round", 0,
           "nanorlhf/support/fast.py",
           "self.decoder.model.load_state_dict(model.state_dict())", "pass",
           "test_fast.py::"
           "test_what_is_captured_is_kept_and_goes_on_with_other_rows_and_weights"),
    Mutant("a graph that reads the prompts of an earlier round", 0, "nanorlhf/support/fast.py",
           "ours.copy_(theirs)", "pass",
           "test_fast.py::"
           "test_what_is_captured_is_kept_and_goes_on_with_other_rows_and_weights"),
    Mutant("a graph of another temperature", 0, "nanorlhf/support/fast.py",
           "decoder.uniforms.shape, *settings", "decoder.uniforms.shape",
           "test_fast.py::"
           "test_what_is_captured_is_kept_and_goes_on_with_other_rows_and_weights"),
    Mutant("a graph that reads too few positions", 0, "nanorlhf/support/fast.py",
           "filled + -filled % width", "max(width, filled - filled % width)",
           "test_fast.py::"
           "test_a_graph_for_every_64_positions_reads_the_filled_ones_and_shares_its_memory"),
    Mutant("a mask for prompts, which rules out the fastest kernel", 0, "nanorlhf/model.py",
           "cache is not None and tokens.shape[1] < cache.filled", "cache is not None",
           "test_attention.py::test_a_pass_that_fills_what_is_read_of_a_cache_is_causal"),
    Mutant("rows whose random numbers stay behind", 0, "nanorlhf/support/fast.py",
           "self.alive, self.uniforms = self.alive[rows], self.uniforms[rows]",
           "self.alive, self.uniforms = self.alive[rows], self.uniforms[:rows.sum()]",
           "test_fast.py::test_decode_writes_what_the_plain_loop_writes"),

    # --- data ---
    Mutant("rows without an end token", 45, "nanorlhf/support/data.py",
           "[[*tokenizer.encode(record[key]), tokenizer.eos] for key in keys]",
           "[tokenizer.encode(record[key]) for key in keys]",
           "test_data.py::test_a_row_is_prompt_response_end"),
    Mutant("a response that was cut and is said to have ended", 17, "nanorlhf/support/data.py",
           "kept = [response[: block_size - 1] for",
           "kept = [response[: block_size - 2] + response[-1:] for",
           "test_data.py::test_a_long_response_loses_its_right_and_with_it_the_end"),
    Mutant("a batch whose mask leaves out the end token", 2, "nanorlhf/support/data.py",
           "< response_len[:, None]", "< response_len[:, None] - 1",
           "test_data.py::test_collate_is_flush_left_and_masks_the_response"),
    Mutant("a split with the same prompt on both sides", 0, "nanorlhf/support/data.py",
           "zlib.crc32(key.encode(\"utf-8\", \"replace\")) for key in keys",
           "zlib.crc32(repr(r).encode()) for r in records",
           "test_data.py::test_a_prompt_is_on_one_side_whatever_the_order_or_the_company"),
    Mutant("the same order in every epoch", 0, "nanorlhf/support/data.py",
           'random.Random(f"{seed} {epoch}")', 'random.Random(f"{seed}")',
           "test_data.py::test_every_epoch_holds_every_row_once_and_has_an_order_of_its_own"),
    Mutant("a prompt that UltraFeedback's answers hold as well, twice", 0,
           "nanorlhf/support/formats.py",
           "if asked and asked[0] in turns[:2]:", "if asked and not turns:",
           "test_formats.py::test_every_form_is_read"),
    Mutant("an answer with a false label that is imitated", 0, "nanorlhf/support/formats.py",
           "(prompt, label and answer)", "(prompt, answer)",
           "test_formats.py::test_an_unpaired_answer_is_a_demonstration_if_it_is_a_good_one"),
    Mutant("an instruction without its input", 0, "nanorlhf/support/formats.py",
           "if k in asks or fields.get(k)]", "if k in asks]",
           "test_formats.py::test_every_form_is_read"),
    Mutant("a prompt that ends within a word", 0, "nanorlhf/support/formats.py",
           r'r".+(?=\s)"', 'r".+"',
           "test_formats.py::test_every_form_is_read"),
    Mutant("a null that counts as an answer", 0, "nanorlhf/support/formats.py",
           "for key, value in fields.items() if value is not None}", "for key in fields}",
           "test_formats.py::test_every_form_is_read"),
    Mutant("a pad token that is the end token", 2, "nanorlhf/tokenizer.py",
           "self.pad = len(ranks) + 1", "self.pad = len(ranks)",
           "test_tokenizer.py::test_vocab_size_counts_bytes_merges_and_specials"),
    Mutant("an end and a pad that are swapped for other libraries", 2, "nanorlhf/tokenizer.py",
           "eos_token_id=self.eos, pad_token_id=self.pad",
           "eos_token_id=self.pad, pad_token_id=self.eos",
           "test_tokenizer.py"
           "::test_the_special_ids_tell_transformers_where_a_row_ends_and_what_fills_it"),

    # --- imitate ---
    Mutant("SFT that learns the prompt", 45, "nanorlhf/sft.py",
           "response_logprobs(model, tokens, prompt_len, mask.shape[1])",
           "response_logprobs(model, tokens, torch.ones_like(prompt_len), mask.shape[1])",
           "test_sft.py::test_only_the_response_is_learnt_and_its_end_with_it"),
    Mutant("SFT that does not learn to end", 45, "nanorlhf/sft.py",
           "mask.shape[1]), mask)",
           "mask.shape[1]), mask & (mask.cumsum(1) < mask.sum(1)[:, None]))",
           "test_sft.py::test_only_the_response_is_learnt_and_its_end_with_it"),
    Mutant("a held-out loss that weighs rows alike", 28, "nanorlhf/sft.py",
           "-logprobs.cpu().double().sum().item() / response_len(rows)",
           "-sum(x / response_len([row]) for x, row in zip(logprobs.tolist(), rows)) / len(rows)",
           "test_sft.py::test_every_token_weighs_the_same_however_rows_are_batched"),
    Mutant("SFT whose every micro-batch weighs the same", 28, "nanorlhf/sft.py",
           "batch, response_len, parts, cfg)", "batch, len, parts, cfg)",
           "test_sft.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("SFT whose every micro-batch weighs like a batch", 28, "nanorlhf/sft.py",
           "batch, response_len, parts, cfg)", "batch, lambda rows: 1, parts, cfg)",
           "test_sft.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("SFT that resumes without its optimizer", 42, "nanorlhf/sft.py",
           "loop.batches(rows, parts, ", "loop.batches(rows, dict(model=model), ",
           "test_sft.py::test_a_resumed_run_ends_with_the_very_same_weights"),
    Mutant("SFT that resumes at the first batch", 0, "nanorlhf/support/loop.py",
           "cfg.seed, state[\"step\"], length)", "cfg.seed, 0, length)",
           "test_sft.py::test_a_resumed_run_ends_with_the_very_same_weights"),
    Mutant("SFT whose learning rate does not fall", 27, "nanorlhf/sft.py",
           "loop.cosine,", "lambda step, steps, warmup: min(1.0, (step + 1) / max(1, warmup)),",
           "test_sft.py::test_a_run_follows_that_schedule_in_every_group_of_weights"),
    Mutant("a resumed run that throws other dice", 32, "nanorlhf/support/checkpoint.py",
           '        torch.set_rng_state(state["random"]["cpu"])\n', "",
           "test_checkpoint.py::test_everything_goes_on_where_it_was"),

    Mutant("a Ctrl-C that saves nothing", 42, "nanorlhf/support/runlog.py",
           "wanted = self.stopping or", "wanted =",
           "test_runlog.py::test_ctrl_c_lets_the_step_end_and_asks_for_a_save"),
    Mutant("a second Ctrl-C that waits as well", 42, "nanorlhf/support/runlog.py",
           "if self.interrupted:", "if False:",
           "test_runlog.py::test_a_second_ctrl_c_does_not_wait"),

    Mutant("DPO that sums over the padding too", 31, "nanorlhf/logprobs.py",
           "masked(response_logprobs(model, tokens, prompt_len, R, temperature), mask).sum(1)",
           "response_logprobs(model, tokens, prompt_len, R, temperature).sum(1)",
           "test_dpo.py"
           "::test_the_log_prob_of_a_response_is_the_sum_over_its_tokens_and_no_others"),
    Mutant("DPO whose every micro-batch weighs like a batch", 28, "nanorlhf/dpo.py",
           "batch, pairs_in, parts, cfg)", "batch, lambda groups: 1, parts, cfg)",
           "test_dpo.py::test_how_the_prompts_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("DPO with dropout", 18, "nanorlhf/dpo.py",
           "    policy.eval()  ", "    policy.train()  ",
           "test_dpo.py::test_the_first_line_of_the_log_says_that_nothing_has_been_learnt"),
    Mutant("DPO that resumes without its optimizer", 42, "nanorlhf/dpo.py",
           "loop.batches(groups, parts, ", "loop.batches(groups, dict(policy=policy), ",
           "test_dpo.py::test_a_resumed_run_ends_with_the_very_same_weights"),

    # --- judge ---
    Mutant("Bradley-Terry with its sides swapped", 12, "nanorlhf/reward.py",
           "F.logsigmoid(chosen - rejected)", "F.logsigmoid(rejected - chosen)",
           "test_reward.py::test_the_loss_by_hand"),
    Mutant("a score that is read at the last position of the batch", 8, "nanorlhf/reward.py",
           "last = prompt_len + mask.sum(1) - 1",
           "last = torch.full_like(prompt_len, tokens.shape[1] - 1)",
           "test_reward.py::test_the_score_is_read_at_the_last_response_token"),
    Mutant("a score that is read one token early", 8, "nanorlhf/reward.py",
           "last = prompt_len + mask.sum(1) - 1", "last = prompt_len + mask.sum(1) - 2",
           "test_reward.py::test_the_score_is_read_at_the_last_response_token"),
    Mutant("a reward model that never sees the prompt", 1, "nanorlhf/reward.py",
           "last = prompt_len + mask.sum(1) - 1",
           "tokens, last = tokens.gather(1, (prompt_len[:, None] + torch.arange(mask.shape[1]))"
           ".clamp(max=tokens.shape[1] - 1)), mask.sum(1) - 1",
           "test_reward.py::test_the_score_is_read_at_the_last_response_token"),
    Mutant("a reward model whose mean is not taken out", 10, "nanorlhf/model.py",
           "        self.transformer.ln_f.bias -= mean * head / (head @ head)\n", "",
           "test_reward.py::test_normalised_scores_have_mean_0_and_deviation_1_also_after_loading"),
    Mutant("a reward model whose deviation is not taken out", 10, "nanorlhf/model.py",
           "        head /= std\n", "",
           "test_reward.py::test_normalised_scores_have_mean_0_and_deviation_1_also_after_loading"),
    Mutant("a reading head whose mean is not taken out", 10, "nanorlhf/model.py",
           "        self.bias -= mean / (self.scale * min(1, length / self.few))\n", "",
           "test_reading.py::test_rescaling_shifts_and_scales_every_number"),
    Mutant("a reading head that is scaled in part", 10, "nanorlhf/model.py",
           "        self.scale /= std\n", "",
           "test_reading.py::test_rescaling_shifts_and_scales_every_number"),
    Mutant("a reading head that compares the prompt as well", 8, "nanorlhf/model.py",
           "at >= (1 if prompt_len is None else prompt_len[:, None])", "at >= 1",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head that leaves out the first word of the response", 8, "nanorlhf/model.py",
           "at >= (1 if prompt_len is None else prompt_len[:, None])",
           "at > (0 if prompt_len is None else prompt_len[:, None])",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head that compares a word with the state after it", 4, "nanorlhf/model.py",
           "self.match(hidden[:, :-1])", "self.match(hidden[:, 1:])",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head that reads the last word alone", 8, "nanorlhf/model.py",
           "masked_fill(~compared, 0).cumsum(1)", "masked_fill(~compared, 0)",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head that adds up and takes no mean", 10, "nanorlhf/model.py",
           "F.pad(fits / compared.cumsum(1).clamp(min=self.few), (1, 0))", "F.pad(fits, (1, 0))",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head whose mean jumps while words are few", 10, "nanorlhf/model.py",
           ".clamp(min=self.few)", ".clamp(min=1)",
           "test_reading.py"
           "::test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits"),
    Mutant("a reading head of which a word can earn more and more", 9, "nanorlhf/model.py",
           "fits = (F.logsigmoid(match) + self.bias)", "fits = (match + self.bias)",
           "test_reading.py::test_no_word_earns_more_by_being_repeated"),
    Mutant("a reading head that starts at random", 9, "nanorlhf/model.py",
           "        self.match.weight = nn.Parameter(0.06 * torch.eye(config.n_embd))\n", "",
           "test_reading.py"
           "::test_it_starts_from_the_scalar_head_and_the_language_models_logits"),
    Mutant("a critic that is not told where the response starts", 8, "nanorlhf/ppo.py",
           "response_window(critic(tokens, prompt_len), prompt_len, R)",
           "response_window(critic(tokens), prompt_len, R)",
           "test_reading.py::test_ppo_tells_the_critic_where_the_response_starts"),
    Mutant("an update that does not tell the critic where the response starts", 8,
           "nanorlhf/ppo.py",
           "critic(batch.tokens, batch.prompt_len)", "critic(batch.tokens)",
           "test_reading.py::test_ppo_tells_the_critic_where_the_response_starts"),
    Mutant("near misses that may be held out", 0, "nanorlhf/environment.py",
           "if r != request and r.held_out <= request.held_out]", "if r != request]",
           "test_reading.py"
           "::test_a_near_miss_differs_in_one_word_and_is_held_out_only_if_the_prompt_is"),
    Mutant("near misses that may be the prompt itself", 0, "nanorlhf/environment.py",
           "if r != request and r.held_out", "if r.held_out",
           "test_reading.py::test_a_near_miss_can_be_had_in_a_certain_word"),
    Mutant("near misses that are judged by the other request", 0, "nanorlhf/reward.py",
           "annotator.compare(prompt, ", "annotator.compare(prompts[i - i % share], ",
           "test_reading.py"
           "::test_near_misses_share_their_answers_and_are_judged_each_by_its_own_request"),
    Mutant("near misses that all see the prompt their answer was written for", 0,
           "nanorlhf/reward.py",
           "[(start + answer, len(start)) for answer in answers]", "shared[i // share]",
           "test_reading.py"
           "::test_near_misses_share_their_answers_and_are_judged_each_by_its_own_request"),
    Mutant("near misses among the held-out comparisons", 0, "nanorlhf/reward.py",
           "if cfg.near_misses and not held_out:", "if cfg.near_misses:",
           "test_reading.py::test_held_out_comparisons_have_no_near_misses"),
    Mutant("answers to near misses, as many as without", 0, "nanorlhf/reward.py",
           "math.ceil(k / share)", "k",
           "test_reading.py::test_half_of_the_shared_answers_are_written_for_either_prompt"),
    Mutant("a probe that changes nothing", 0, "train_rm.py",
           "others = [environment.near_miss(p, rng, slot) for p in prompts]", "others = prompts",
           "test_reading.py::test_the_true_reward_reads_the_request_and_a_blind_judge_does_not"),
    Mutant("a probe of any word instead of the one it names", 0, "train_rm.py",
           "environment.near_miss(p, rng, slot)", "environment.near_miss(p, rng)",
           "test_reading.py"
           "::test_a_judge_who_reads_one_word_of_the_request_is_told_from_the_others"),
    Mutant("a probe of requests that were trained on", 0, "train_rm.py",
           "environment.prompts(n, seed, held_out=True), random.Random(f\"probe",
           "environment.prompts(n, seed), random.Random(f\"probe",
           "test_reading.py::test_the_probe_asks_for_held_out_requests"),
    Mutant("a world that hardly pays for the mood", 0, "nanorlhf/environment.py",
           "mood=3 * max(", "mood=max(",
           "test_environment.py::test_what_was_asked_for_is_the_largest_part_of_the_true_reward"),
    Mutant("a world that hardly pays for the nouns", 0, "nanorlhf/environment.py",
           "for w in words if w in known])\n", "for w in words if w in known]) / 2\n",
           "test_environment.py::test_what_was_asked_for_is_the_largest_part_of_the_true_reward"),
    Mutant("a reward model whose learning rate does not fall", 11, "nanorlhf/reward.py",
           "loop.linear,", "lambda step, steps, warmup: min(1.0, (step + 1) / max(1, warmup)),",
           "test_reward.py"
           "::test_the_rate_rises_and_then_falls_to_zero_and_the_heads_is_ten_times_as_high"),
    Mutant("a reward model left in training mode", 18, "nanorlhf/reward.py",
           "    model.eval()\n", "",
           "test_reward.py::test_a_trained_reward_model_throws_no_dice"),
    Mutant("a reward model whose head learns no faster than its trunk", 9, "nanorlhf/reward.py",
           "lr=10 * cfg.learning_rate", "lr=cfg.learning_rate",
           "test_reward.py"
           "::test_the_rate_rises_and_then_falls_to_zero_and_the_heads_is_ten_times_as_high"),
    Mutant("a tie that counts as wrong", 0, "nanorlhf/support/stats.py",
           "(1 + margin.sign()).mean() / 2", "(margin > 0).to(margin.dtype).mean()",
           "test_reward.py::test_a_tie_is_half_right_by_hand"),
    Mutant("a tie that counts as wrong in the log of training", 0, "nanorlhf/reward.py",
           "accuracy=accuracy_of(margin), margin", "accuracy=(margin > 0).float().mean(), margin",
           "test_reward.py::test_in_the_log_of_training_a_tie_is_half_right"),
    Mutant("a tie that counts as right in the report", 0, "nanorlhf/reward.py",
           "accuracy, longer = accuracy_of(margin).item()",
           "accuracy, longer = (margin >= 0).double().mean().item()",
           "test_reward.py::test_a_model_that_gives_every_response_the_same_score_is_half_right"),
    Mutant("a tie that counts as wrong in the calibration", 0, "train_rm.py",
           "(1 + margin.sign()) / 2", "(margin > 0).double()",
           "test_reward.py::test_in_the_calibration_a_tie_is_half_true"),
    Mutant("comparisons sampled all at once", 0, "nanorlhf/reward.py",
           "batch_size=cfg.micro_batch_size * G, ", "",
           "test_scripts.py"
           "::test_the_micro_batch_size_bounds_what_the_reward_model_samples_and_changes_no_result"),
    Mutant("samples to normalise by, all at once", 0, "train_rm.py",
           ",\n                         batch_size=cfg.micro_batch_size * G)", ")",
           "test_scripts.py"
           "::test_the_micro_batch_size_bounds_what_the_reward_model_samples_and_changes_no_result"),
    Mutant("a reward model whose every micro-batch weighs the same", 28, "nanorlhf/reward.py",
           "batch, pairs_in, parts, cfg)", "batch, len, parts, cfg)",
           "test_reward.py::test_how_the_prompts_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("a reward model whose every micro-batch weighs like a batch", 28, "nanorlhf/reward.py",
           "batch, pairs_in, parts, cfg)", "batch, lambda groups: 1, parts, cfg)",
           "test_reward.py::test_how_the_prompts_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("a reward model that resumes without its optimizer", 42, "nanorlhf/reward.py",
           "loop.batches(groups, parts, ", "loop.batches(groups, dict(model=model), ",
           "test_reward.py::test_a_resumed_run_ends_with_the_very_same_weights"),

    # --- learn from the same data without it ---
    Mutant("DPO with its sides swapped", 12, "nanorlhf/dpo.py",
           "bradley_terry_loss(chosen, rejected)", "bradley_terry_loss(rejected, chosen)",
           "test_exact.py::test_dpo_ends_where_rlhf_ends"),
    Mutant("DPO that forgets the reference", 38, "nanorlhf/dpo.py",
           "    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)\n    rejected = beta"
           " * (rejected_logprobs - ref_rejected_logprobs)",
           "    chosen, rejected = beta * chosen_logprobs, beta * rejected_logprobs",
           "test_exact.py::test_dpo_ends_where_rlhf_ends"),
    Mutant("DPO that forgets the price", 0, "nanorlhf/dpo.py",
           "    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)\n    rejected = beta"
           " * (rejected_logprobs - ref_rejected_logprobs)",
           "    chosen = (chosen_logprobs - ref_chosen_logprobs)\n    rejected = (rejected_l"
           "ogprobs - ref_rejected_logprobs)",
           "test_exact.py::test_dpo_ends_where_rlhf_ends"),
    Mutant("a DPO report that forgets the reference", 38, "nanorlhf/dpo.py",
           "whole_logprobs(policy, *batch)\n                                  - whole_logpro"
           "bs(reference, *batch))",
           "whole_logprobs(policy, *batch))",
           "test_dpo.py::test_before_the_first_step_the_policy_has_no_opinion"),
    Mutant("an expectile of 1 - tau", 0, "nanorlhf/ilql.py",
           "(gap < 0)", "(gap > 0)",
           "test_exact.py::test_expectile_loss_by_hand"),

    # --- Q-learning on logged text ---
    Mutant("ILQL whose score is one token early", 8, "nanorlhf/ilql.py",
           "mask.sum(1) - 1] = scores", "mask.sum(1) - 2] = scores",
           "test_ilql.py::test_targets_by_hand"),
    Mutant("Q targets without the values", 22, "nanorlhf/ilql.py",
           "return gae(rewards, values, mask, gamma, lam) + values",
           "return gae(rewards, values, mask, gamma, lam)",
           "test_ilql.py::test_targets_by_hand"),
    Mutant("Q targets that draw V to them", 0, "nanorlhf/ilql.py",
           "values.detach()", "values",
           "test_ilql.py::test_v_follows_the_target_heads_and_is_not_drawn_to_what_it_is_the_target_of"),
    Mutant("V that follows the learning heads", 0, "nanorlhf/ilql.py",
           "for q in model.target_q))", "for q in model.q))",
           "test_ilql.py::test_the_losses_are_those_of_a_slow_loop_over_the_tokens"),
    Mutant("V that follows the more hopeful head", 0, "nanorlhf/ilql.py",
           "torch.minimum(", "torch.maximum(",
           "test_ilql.py::test_the_losses_are_those_of_a_slow_loop_over_the_tokens"),
    Mutant("a conservative term that favours what nobody wrote", 0, "nanorlhf/ilql.py",
           "sum(-masked_mean(fast", "sum(masked_mean(fast",
           "test_ilql.py::test_the_conservative_loss_by_hand"),
    Mutant("a conservative term that counts the padding", 31, "nanorlhf/ilql.py",
           "-masked_mean(fast.rows_at_a_time(token_logprobs, x, chosen), mask)",
           "-fast.rows_at_a_time(token_logprobs, x, chosen).mean()",
           "test_ilql.py"
           "::test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("target heads that are the learning ones", 0, "nanorlhf/ilql.py",
           "target.lerp_(q, polyak)", "target.copy_(q)",
           "test_ilql.py::test_the_target_heads_move_by_polyak_and_by_nothing_else"),
    Mutant("ILQL with dropout", 18, "nanorlhf/ilql.py",
           "model.eval().q.parameters()", "model.train().q.parameters()",
           "test_ilql.py::test_dropout_is_off_while_it_learns"),
    Mutant("ILQL whose every micro-batch weighs like a batch", 28, "nanorlhf/ilql.py",
           "batch, weight, parts, cfg)", "batch, lambda rows: 1, parts, cfg)",
           "test_ilql.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("ILQL that resumes without its optimizer", 42, "nanorlhf/ilql.py",
           "loop.batches(pairs, parts, ", "loop.batches(pairs, dict(model=model), ",
           "test_ilql.py::test_a_resumed_run_ends_with_the_very_same_weights"),
    Mutant("equal scores that become noise", 0, "nanorlhf/support/stats.py",
           "scores.cpu().double()", "scores.float().cpu()",
           "test_ilql.py::test_equal_scores_are_0_and_not_noise_made_large"),
    Mutant("a policy that takes the more hopeful head", 0, "nanorlhf/model.py",
           "torch.minimum(", "torch.maximum(",
           "test_ilql.py::test_a_large_beta_takes_what_the_less_hopeful_head_likes_best"),
    Mutant("a policy that forgets how far it is tilted", 42, "nanorlhf/support/pretrained.py",
           "if name.startswith(bare) else name",
           'if not name.startswith(("transformer.", "score.", "q.", "target_q.", "v.")) '
           "else name",
           "test_ilql.py::test_what_is_loaded_says_what_was_saved_its_beta_included"),
    Mutant("a tilted policy of which others open the trunk alone", 0, "nanorlhf/model.py",
           'settings = dict(model_type="qgpt")', "settings = {}",
           "test_ilql.py::test_transformers_refuses_it_and_does_not_open_the_trunk_alone"),

    # --- PPO: collect ---
    Mutant("a score one token early", 8, "nanorlhf/ppo.py",
           "last = mask.sum(1) - 1 ", "last = mask.sum(1) - 2 ",
           "test_ppo.py::test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score"),
    Mutant("a score on the token after the end", 8, "nanorlhf/ppo.py",
           "last = mask.sum(1) - 1 ", "last = mask.sum(1).clamp(max=mask.shape[1] - 1) ",
           "test_ppo.py::test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score"),
    Mutant("a score at the end of the batch", 8, "nanorlhf/ppo.py",
           "last = mask.sum(1) - 1 ", "last = mask.shape[1] - 1 ",
           "test_ppo.py::test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score"),
    Mutant("KL charged beyond the mask", 30, "nanorlhf/ppo.py",
           "rewards = -kl_coef * masked(kl, mask)", "rewards = -kl_coef * kl",
           "test_ppo.py::test_nothing_behind_the_mask_is_ever_charged"),
    Mutant("KL clamped at zero", 37, "nanorlhf/ppo.py",
           "rewards = -kl_coef * masked(kl, mask)",
           "rewards = -kl_coef * masked(kl.clamp(min=0), mask)",
           "test_ppo.py::test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score"),
    Mutant("a KL price that is paid out", 33, "nanorlhf/ppo.py",
           "rewards = -kl_coef", "rewards = kl_coef",
           "test_ppo.py::test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score"),
    Mutant("a response without a critic that pays for no KL", 34, "nanorlhf/ppo.py",
           "cfg.advantage, scores, penalty,", "cfg.advantage, scores, 0 * penalty,",
           "test_ppo.py::test_without_a_critic_a_response_is_pushed_by_all_that_it_earned"),
    Mutant("a response without a critic that pays for its padding", 30, "nanorlhf/ppo.py",
           "kl_coef * masked(kl, mask).sum(1)", "kl_coef * kl.sum(1)",
           "test_ppo.py::test_without_a_critic_a_response_is_pushed_by_all_that_it_earned"),
    Mutant("a limit of rows in memory that sampling forgets", 0, "nanorlhf/ppo.py",
           "cfg.responses, cfg.micro_batch_size, cfg.dtype)", "cfg.responses, 0, cfg.dtype)",
           "test_ppo.py::test_a_micro_batch_bounds_what_is_sampled_at_once"),
    Mutant("a limit of rows in memory that measuring forgets", 0, "nanorlhf/ppo.py",
           "size = cfg.micro_batch_size or math", "size = math",
           "test_ppo.py::test_a_micro_batch_bounds_what_is_sampled_at_once"),
    Mutant("responses that stand beside those of other prompts", 41, "nanorlhf/generate.py",
           "cache.keep(group)", "cache.keep(torch.arange(B) % (B // G))",
           "test_generate.py::"
           "test_responses_to_one_prompt_share_its_pass_and_are_what_they_would_be_alone"),
    Mutant("k3 as the price", 34, "nanorlhf/ppo.py",
           'kl = kl_k1(measured["old_logprobs"], measured["ref_logprobs"])',
           'kl = kl_k3(measured["old_logprobs"], measured["ref_logprobs"])',
           "test_ppo.py::test_a_rollout_agrees_with_itself"),
    Mutant("a fine for responses that do end", 16, "nanorlhf/ppo.py",
           "cfg.no_end_penalty * ~ended", "cfg.no_end_penalty * ended",
           "test_ppo.py"
           "::test_a_response_that_never_ends_can_be_fined_and_its_score_stays_what_it_was"),
    Mutant("a response cut off by the limit that counts as ended", 17, "nanorlhf/ppo.py",
           "[row[-1] == eos for row, _ in rows]", "[True for row, _ in rows]",
           "test_ppo.py::test_the_mask_ends_with_the_end_token_or_with_the_limit"),
    Mutant("a temperature that the reference forgets", 13, "nanorlhf/ppo.py",
           "response_logprobs(reference, tokens, prompt_len, R, temperature)",
           "response_logprobs(reference, tokens, prompt_len, R)",
           "test_ppo.py::test_a_rollout_agrees_with_itself"),
    Mutant("values taken after the token", 4, "nanorlhf/ppo.py",
           "response_window(critic(tokens, prompt_len), prompt_len, R)",
           "response_window(critic(tokens, prompt_len), prompt_len + 1, R)",
           "test_ppo.py::test_a_rollout_agrees_with_itself"),
    Mutant("returns from whitened advantages", 22, "nanorlhf/ppo.py",
           "returns=raw + values", "returns=whiten(raw, mask) + values",
           "test_ppo.py::"
           "test_returns_are_raw_advantages_plus_values_and_whitening_leaves_them_alone"),
    Mutant("returns without the values", 22, "nanorlhf/ppo.py",
           "returns=raw + values", "returns=raw",
           "test_ppo.py::"
           "test_returns_are_raw_advantages_plus_values_and_whitening_leaves_them_alone"),
    Mutant("advantages that are not whitened", 23, "nanorlhf/ppo.py",
           "advantages=whiten(raw, mask)", "advantages=raw",
           "test_ppo.py"
           "::test_returns_are_raw_advantages_plus_values_and_whitening_leaves_them_alone"),
    Mutant("whitened advantages that keep their mean", 23, "nanorlhf/ppo.py",
           "advantages=whiten(raw, mask)", "advantages=whiten(raw, mask, False)",
           "test_ppo.py"
           "::test_returns_are_raw_advantages_plus_values_and_whitening_leaves_them_alone"),
    Mutant("old log-probs that carry a gradient", 0, "nanorlhf/ppo.py",
           "@torch.no_grad()\ndef collect(", "def collect(",
           "test_ppo.py::test_every_response_is_in_one_minibatch_of_each_epoch"),

    # --- PPO: update ---
    Mutant("a policy loss that takes the better term", 0, "nanorlhf/ppo.py",
           "surrogate = torch.min(", "surrogate = torch.max(",
           "test_ppo.py::test_clipping_stops_the_push_in_the_good_direction_only"),
    Mutant("a ratio that is clipped from above only", 0, "nanorlhf/ppo.py",
           "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)",
           "test_ppo.py::test_clipping_stops_the_push_in_the_good_direction_only"),
    Mutant("a ratio upside down", 0, "nanorlhf/ppo.py",
           "masked(logprobs - old_logprobs, mask)", "masked(old_logprobs - logprobs, mask)",
           "test_ppo.py::test_the_first_step_is_plain_policy_gradient"),
    Mutant("a ratio that garbage behind the mask makes infinite", 30, "nanorlhf/ppo.py",
           "masked(logprobs - old_logprobs, mask)", "(logprobs - old_logprobs)",
           "test_ledger.py::test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("a policy loss that is not negated", 0, "nanorlhf/ppo.py",
           "return -masked_mean(surrogate, mask)", "return masked_mean(surrogate, mask)",
           "test_ppo.py::test_the_first_step_is_plain_policy_gradient"),
    Mutant("a value loss of the clipped values alone", 25, "nanorlhf/ppo.py",
           "torch.max((values - returns) ** 2, (clipped - returns) ** 2)",
           "(clipped - returns) ** 2",
           "test_ppo.py::test_value_loss_by_hand"),
    Mutant("a value loss without its half", 25, "nanorlhf/ppo.py",
           "return 0.5 * masked_mean(", "return masked_mean(",
           "test_ppo.py::test_value_loss_by_hand"),
    Mutant("dropout on in the update", 18, "nanorlhf/ppo.py",
           "history = []", "history = []\n    policy.train()",
           "test_ppo.py::test_an_update_does_not_turn_dropout_on"),
    Mutant("a temperature that the update forgets", 13, "nanorlhf/ppo.py",
           "batch.tokens, batch.prompt_len, R, cfg.temperature)",
           "batch.tokens, batch.prompt_len, R)",
           "test_ppo.py::test_a_forgotten_temperature_is_caught"),
    Mutant("a first ratio that nobody checks", 19, "nanorlhf/ppo.py",
           'if not (gap := float(history[0]["ratio_gap"])) < 0.01:', "if False:",
           "test_ppo.py::test_dropout_left_on_is_caught"),
    Mutant("a check of the first ratio that python -O leaves out", 19, "nanorlhf/ppo.py",
           "raise RuntimeError(f", "assert False, (f",
           "test_ppo.py::"
           "test_a_ratio_that_is_not_1_is_caught_under_python_without_asserts_too"),
    Mutant("minibatches that are never shuffled", 0, "nanorlhf/ppo.py",
           "torch.randperm(len(rollout))",
           "torch.arange(len(rollout))",
           "test_ppo.py::test_every_epoch_deals_the_minibatches_anew"),
    Mutant("minibatches that leave rows out", 0, "nanorlhf/ppo.py",
           ".chunk(cfg.minibatches)", ".chunk(cfg.minibatches + 1)[:cfg.minibatches]",
           "test_ppo.py::test_every_response_is_in_one_minibatch_of_each_epoch"),
    Mutant("PPO with stale gradients", 28, "nanorlhf/support/loop.py",
           "        optimizer.zero_grad()\n", "        pass\n",
           "test_ledger.py::test_stale_gradients_do_not_reach_the_next_step"),
    Mutant("PPO whose gradients are cleared before they are used", 28, "nanorlhf/support/loop.py",
           "        optimizer.step()\n",
           "        optimizer.zero_grad()\n"
           "        optimizer.step()\n",
           "test_ledger.py::test_stale_gradients_do_not_reach_the_next_step"),
    Mutant("PPO whose every micro-batch weighs the same", 28, "nanorlhf/support/loop.py",
           "share = weight(part) / whole", "share = len(part) / len(batch)",
           "test_ppo.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("PPO whose every micro-batch weighs like a minibatch", 28, "nanorlhf/support/loop.py",
           "(share * loss).backward()", "loss.backward()",
           "test_ppo.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("PPO that learns from its last micro-batch alone", 28, "nanorlhf/support/loop.py",
           "        share = weight(part) / whole\n",
           "        share = weight(part) / whole\n"
           "        [x.zero_grad() for x in optimizers(parts).values()]\n",
           "test_ppo.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("metrics that add up over micro-batches", 28, "nanorlhf/support/loop.py",
           "metrics[name] += share * x.detach()", "metrics[name] += x.detach()",
           "test_ppo.py::test_how_the_rows_are_split_to_fit_into_memory_changes_nothing"),
    Mutant("metrics of the last step alone", 0, "nanorlhf/ppo.py",
           "for m in history) / len(history)", "for m in history[-1:])",
           "test_ppo.py::test_the_numbers_of_an_update_are_means_over_its_steps"),
    Mutant("gradients that are not clipped", 0, "nanorlhf/support/loop.py",
           "clip_gradients(params, cfg.grad_clip)", "clip_gradients(params, float('inf'))",
           "test_ppo.py::test_a_step_is_no_longer_than_allowed"),
    Mutant("KL of the update with its arguments reversed", 29, "nanorlhf/ppo.py",
           "kl_k3(batch.old_logprobs, logprobs)", "kl_k3(logprobs, batch.old_logprobs)",
           "test_ledger.py::test_approx_kl_is_the_kl_from_the_old_policy_to_the_new"),
    Mutant("KL of the update that may be negative", 29, "nanorlhf/ppo.py",
           "kl_k3(batch.old_logprobs, logprobs)", "logprobs - batch.old_logprobs",
           "test_ledger.py::test_approx_kl_is_the_kl_from_the_old_policy_to_the_new"),
    Mutant("a clip fraction that sees one side", 31, "nanorlhf/ppo.py",
           "((ratio - 1).abs() > clip)", "(ratio - 1 > clip)",
           "test_ppo.py::test_how_far_an_update_has_moved_by_hand"),

    # --- PPO: train ---
    Mutant("a logged KL that counts the padding", 39, "nanorlhf/ppo.py",
           "kl=masked(kl_k1(*logprobs), mask)", "kl=kl_k1(*logprobs)",
           "test_ledger.py::"
           "test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("a logged KL per token", 36, "nanorlhf/ppo.py",
           "kl=masked(kl_k1(*logprobs), mask).sum(1).mean()",
           "kl=masked_mean(kl_k1(*logprobs), mask)",
           "test_ppo.py::test_the_numbers_of_a_rollout_by_hand"),
    Mutant("a logged entropy that counts the padding", 31, "nanorlhf/ppo.py",
           "masked_mean(rollout.entropy, mask)", "rollout.entropy.mean()",
           "test_ledger.py::test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("an explained variance that counts the padding", 31, "nanorlhf/ppo.py",
           "(rollout.returns - rollout.old_values)[mask]",
           "(rollout.returns - rollout.old_values)",
           "test_ledger.py::test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric"),
    Mutant("an explained variance upside down", 0, "nanorlhf/ppo.py",
           "1 - error.var(correction=0) / variance",
           "1 - variance / error.var(correction=0)",
           "test_ppo.py::test_the_numbers_of_a_rollout_by_hand"),
    Mutant("a KL price that falls when KL is too high", 36, "nanorlhf/ppo.py",
           "kl / cfg.kl_target - 1", "1 - kl / cfg.kl_target",
           "test_ppo.py::test_the_price_rises_above_the_target_and_falls_below"),
    Mutant("a KL price that is told the KL of a token", 36, "nanorlhf/ppo.py",
           'adapt(kl_coef, metrics["kl"], cfg)',
           'adapt(kl_coef, metrics["kl"] / metrics["response_len"], cfg)',
           "test_ledger.py::test_the_price_is_adapted_to_the_kl_summed_over_a_response"),
    Mutant("a KL price that starts from the first one again every round", 36, "nanorlhf/ppo.py",
           'adapt(kl_coef, metrics["kl"], cfg)', 'adapt(cfg.kl_coef, metrics["kl"], cfg)',
           "test_ppo.py::test_the_price_goes_on_from_what_it_was_the_round_before"),
    Mutant("Adam with the same beta twice", 26, "nanorlhf/support/loop.py",
           "betas=(0.9, 0.95)", "betas=(0.9, 0.9)",
           "test_ledger.py::test_the_optimizers_are_adam_with_the_epsilon_and_betas_of_ppo"),
    Mutant("Adam with PyTorch's own epsilon", 26, "nanorlhf/ppo.py",
           "eps=1e-5", "eps=1e-8",
           "test_ledger.py::test_the_optimizers_are_adam_with_the_epsilon_and_betas_of_ppo"),
    Mutant("a learning rate that does not fall", 27, "nanorlhf/support/loop.py",
           "max(1, warmup), 1 - step / steps)", "max(1, warmup), 1.0)",
           "test_ppo.py::test_learning_rates_fall_in_a_straight_line"),
    Mutant("a learning rate that is set after the update", 27, "nanorlhf/support/loop.py",
           "schedule(number, steps, cfg.warmup)",
           "(schedule(number - 1, steps, cfg.warmup) if number else 0.0)",
           "test_ppo.py::test_learning_rates_fall_in_a_straight_line"),
    Mutant("a learning rate that begins at nothing", 27, "nanorlhf/support/loop.py",
           "min((step + 1) / max", "min(step / max",
           "test_loop.py::test_it_rises_first_if_that_is_wanted"),
    Mutant("a learning rate that forgets to warm up", 27, "nanorlhf/support/loop.py",
           "min((step + 1) / max(1, warmup), 1 - step / steps)", "1 - step / steps",
           "test_loop.py::test_it_rises_first_if_that_is_wanted"),
    Mutant("a cosine that does not fall", 27, "nanorlhf/support/loop.py",
           "return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))", "return 1.0",
           "test_loop.py::test_a_cosine_rises_in_a_straight_line_and_falls_to_a_tenth"),
    Mutant("a rate that every group of weights shares", 0, "nanorlhf/support/loop.py",
           'group["lr"] = group["initial_lr"] *',
           'group["lr"] = optimizer.param_groups[0]["initial_lr"] *',
           "test_loop.py::test_every_rate_follows_the_schedule_from_the_rate_it_had"),
    Mutant("a reference that is the policy itself", 38, "nanorlhf/ppo.py",
           "    reference.requires_grad_(False)\n", "    reference = policy\n",
           "test_ppo.py::test_a_dearer_kl_keeps_the_policy_closer"),
    Mutant("a reference that is the policy of the round before", 38, "nanorlhf/ppo.py",
           "        rollout = collect(",
           "        reference.load_state_dict(policy.state_dict())\n"
           "        rollout = collect(",
           "test_ppo.py::test_the_score_goes_up_on_the_toy_task"),
    Mutant("PPO that resumes without its optimizers", 42, "nanorlhf/ppo.py",
           "dict(policy=policy, **optimizers, **", "dict(policy=policy, **",
           "test_ppo.py::test_a_resumed_run_ends_with_the_very_same_weights"),
    Mutant("PPO that resumes without its critic", 42, "nanorlhf/ppo.py",
           "{} if critic is None else dict(critic=critic)", "{}",
           "test_ppo.py::test_a_resumed_run_ends_with_the_very_same_weights"),
    Mutant("PPO that resumes at the first prompts", 0, "nanorlhf/support/loop.py",
           'cfg.seed, state["step"], length)', "cfg.seed, 0, length)",
           "test_ppo.py::test_a_resumed_run_ends_with_the_very_same_weights"),

    # --- PPO: the script ---
    Mutant("a policy and a reference that share their weights", 38, "train_ppo.py",
           "(policy, tok), (reference, _) = (load_policy(cfg.sft, device) for _ in range(2))",
           "policy, tok = load_policy(cfg.sft, device)\n"
           "    reference = policy",
           "test_ledger.py::test_ppo_starts_from_sft_stays_near_sft_and_asks_the_reward_model"),
    Mutant("a critic that shares its weights with the reward model", 0, "train_ppo.py",
           "    score = reward.score_function(cfg, tok, policy)",
           "    score = reward.by_model(critic)",
           "test_ledger.py::test_ppo_starts_from_sft_stays_near_sft_and_asks_the_reward_model"),
    Mutant("PPO that trains on held-out prompts", 0, "train_ppo.py",
           "for text in texts])[0]]", "for text in texts])[1]]",
           "test_ledger.py::test_ppo_never_trains_on_a_prompt_that_is_held_out"),

    # --- did it help? ---
    Mutant("a tie that counts as a win", 0, "nanorlhf/support/stats.py",
           "(a > b) + 0.5 * (a == b)", "(a >= b)",
           "test_evaluate.py::test_a_tie_is_half_a_win"),
    Mutant("a KL and a perplexity of a response that count the padding", 31, "nanorlhf/logprobs.py",
           "masked(response_logprobs(model, tokens, prompt_len, R, temperature), mask).sum(1)",
           "response_logprobs(model, tokens, prompt_len, R, temperature).sum(1)",
           "test_evaluate.py::test_padding_is_no_part_of_what_a_response_is_like"),
    Mutant("samples that depend on what was drawn before", 32, "nanorlhf/evaluate.py",
           "dtype=cfg.dtype, rng=rng)", "dtype=cfg.dtype)",
           "test_evaluate.py"
           "::test_the_same_seed_draws_the_same_responses_whatever_was_drawn_before"),
    Mutant("an evaluation of another seed than the run's", 32, "nanorlhf/evaluate.py",
           "manual_seed(cfg.seed)", "manual_seed(cfg.seed + cfg.prompts)",
           "test_scripts.py::test_evaluate_says_of_a_finished_run_exactly_what_the_run_said"),
    Mutant("an evaluation that samples all at once", 0, "nanorlhf/evaluate.py",
           "batch_size=cfg.micro_batch_size, ", "",
           "test_evaluate.py"
           "::test_the_micro_batch_size_bounds_what_is_in_memory_and_changes_no_result"),
    Mutant("a judge that reads all at once", 0, "nanorlhf/evaluate.py",
           "cfg.micro_batch_size or 64).tolist", "64).tolist",
           "test_evaluate.py"
           "::test_the_micro_batch_size_bounds_what_is_in_memory_and_changes_no_result"),
    Mutant("a measurement of all responses at once", 0, "nanorlhf/evaluate.py",
           "cfg.micro_batch_size or 64).cpu().double()", "64).double()",
           "test_evaluate.py"
           "::test_the_micro_batch_size_bounds_what_is_in_memory_and_changes_no_result"),
    Mutant("a study that makes again what it has", 0, "nanorlhf/experiments/study.py",
           "if key not in done]", "]",
           "test_study.py::test_an_interrupted_study_makes_only_the_rows_that_are_missing"),
    Mutant("a law that grows where it should decline", 0, "nanorlhf/experiments/overoptimise.py",
           "-d * decline(d)", "d * decline(d)",
           "test_study.py::test_a_law_is_found_again_in_numbers_that_follow_it"),
    Mutant("a true reward of other responses than the score", 0,
           "nanorlhf/experiments/overoptimise.py",
           "for row, n in self.batch]", "for row, n in [*self.batch][:2]]",
           "test_study.py::"
           "test_the_true_reward_of_a_round_stands_beside_the_score_of_the_same_round"),

    # --- several processes, and what goes wrong ---
    Mutant("processes that keep their gradients to themselves", 0, "nanorlhf/support/parallel.py",
           "exchange(dist.all_reduce, p.grad)", "pass",
           "test_parallel.py::test_two_processes_learn_what_one_does"),
    Mutant("processes that all drop the same units", 0, "nanorlhf/support/parallel.py",
           "seed + rank()", "seed",
           "test_parallel.py::"
           "test_dropout_differs_from_process_to_process_and_what_is_common_stays_common"),
    Mutant("processes that draw one number more than one process does", 0,
           "nanorlhf/support/parallel.py",
           "torch.randint(2**62, ()).item()",
           "torch.randint(2**62, ()).item() if world_size() > 1 else 0",
           "test_parallel.py::test_ppo_in_two_processes_learns_what_one_does"),
    Mutant("dropout that changes what all processes draw next", 0, "nanorlhf/support/parallel.py",
           "    with torch.random.fork_rng(gpu, enabled=several):\n", "    if True:\n",
           "test_parallel.py::"
           "test_dropout_differs_from_process_to_process_and_what_is_common_stays_common"),
    Mutant("rows that are put together in another order", 0, "nanorlhf/support/parallel.py",
           "for local in all_gather(rows) for row in local",
           "for local in all_gather(rows)[::-1] for row in local",
           "test_parallel.py::test_a_rollout_that_is_shared_out_is_that_of_one_process"),
    Mutant("processes that sample with the random numbers of the first rows", 0,
           "nanorlhf/generate.py",
           "parallel.local_rows(prompts), parallel.local_rows(uniforms)",
           "parallel.local_rows(prompts), uniforms",
           "test_parallel.py::test_two_and_three_processes_sample_the_very_rows_that_one_does"),
    Mutant("support that imports the course", 0, "nanorlhf/support/parallel.py",
           "from nanorlhf.support import UserError\n",
           "import nanorlhf.attention\nfrom nanorlhf.support import UserError\n",
           "test_layout.py::test_support_imports_nothing_of_ours_but_support"),

    # --- the command line, and files of strangers ---
    Mutant("help that begins with what all commands share", 0, "nanorlhf/support/config.py",
           "filter(is_dataclass, cls.__mro__)",
           "filter(is_dataclass, cls.__mro__[::-1])",
           "test_config.py::"
           "test_help_shows_the_fields_of_the_class_first_and_every_comment_of_its_bases"),
    Mutant("a terminal that must know every character", 0, "nanorlhf/support/config.py",
           'errors="replace"', 'errors="strict"',
           "test_config.py::"
           "test_a_terminal_that_knows_only_ascii_shows_question_marks_and_no_traceback"),
    Mutant("a remedy that the command does not have", 0, "nanorlhf/support/config.py",
           'if hasattr(cls, "micro_batch_size"):', "if True:",
           "test_config.py::test_out_of_memory_names_the_setting_only_of_a_command_that_has_it"),
    Mutant("a remedy that sampling does not heed", 0, "nanorlhf/ppo.py",
           "cfg.responses, cfg.micro_batch_size, cfg.dtype)", "cfg.responses, 0, cfg.dtype)",
           "test_config.py::test_the_setting_that_is_named_is_a_remedy_when_sampling_runs_out"),
    Mutant("memory of a CPU that runs out with a traceback", 0, "nanorlhf/support/config.py",
           "can't allocate memory|not enough memory", "can't allocate memory",
           "test_config.py::test_whatever_way_memory_runs_out_it_is_one_line"),
    Mutant("a safetensors file whose tensors may overlap", 0, "nanorlhf/support/checkpoint.py",
           'if entry["data_offsets"] != [begin, end] or', "if",
           "test_checkpoint.py::test_a_file_with"),
    Mutant("a safetensors header that need not match the numbers", 0,
           "nanorlhf/support/checkpoint.py",
           "if 8 + length + end != size:", "if False:", "test_checkpoint.py::test_a_file_with"),
    Mutant("a broken download that begins anew", 0, "nanorlhf/support/pretrained.py",
           "start = file.seek(0, os.SEEK_END)", "start = file.seek(0)",
           "test_pretrained.py::test_a_broken_download_goes_on_where_it_broke"),
    Mutant("a save of weights that are no numbers", 0, "nanorlhf/support/checkpoint.py",
           "if not all(w.isfinite().all() for w in weights):", "if False:",
           "test_failures.py::test_weights_that_are_no_numbers_are_never_saved_over_good_ones"),

    # --- labels by people ---
    Mutant("a double click that is two labels", 0, "nanorlhf/people/label.py",
           '(showing in self.labels) != (choice == "undo")', 'choice == "undo" and not self.labels',
           "test_label.py::test_the_same_showing_twice_is_one_label"),
    Mutant("a chosen answer that stood on the other side", 0, "nanorlhf/people/label.py",
           'dict(zip(("left", "right"), sides))', 'dict(zip(("right", "left"), sides))',
           "test_label.py::test_what_is_left_is_random_and_the_record_says_what_was"),
    Mutant("a page for those who know its port", 0, "nanorlhf/people/label.py",
           'host not in (f"127.0.0.1:{port}", f"localhost:{port}")',
           'not host.endswith(f":{port}")',
           "test_label.py::test_pages_of_others_may_neither_read_nor_choose"),
    Mutant("choices by the page of another site", 0, "nanorlhf/people/label.py",
           'self.headers.get("Origin", f"http://{host}") != f"http://{host}"', "False",
           "test_label.py::test_pages_of_others_may_neither_read_nor_choose"),
    Mutant("a label that a power cut may take", 0, "nanorlhf/support/labels.py",
           "os.fsync(file.fileno())", "pass",
           "test_label.py::test_each_choice_is_on_the_disk_before_it_is_confirmed"),
    Mutant("half a line that stays and spoils the next", 0, "nanorlhf/support/labels.py",
           r'content.rfind(b"\n") + 1', "len(content)",
           "test_label.py::test_a_last_line_that_a_crash_cut_goes_and_all_others_stay"),
    Mutant("an undo that no reader honours", 0, "nanorlhf/support/labels.py",
           'labels.pop(str(fields["showing"]), None)', 'labels.get(str(fields["showing"]), None)',
           "test_label.py::test_both_readers_take_the_file_as_it_is"),
    Mutant("a pair that was shown twice and counts twice", 0, "nanorlhf/support/labels.py",
           'elif fields.get("repeat") and not repeats:', "elif False:",
           "test_label.py::test_some_pairs_come_back_ten_pairs_later_and_count_for_self_agreement_alone"),

    # --- how fast is it? ---
    Mutant("flops without the way back", 0, "nanorlhf/experiments/bench.py",
           "return 3 * (policy + critic)", "return (policy + critic)",
           "test_bench.py::test_the_update_costs_the_flops_that_are_claimed"),
    Mutant("a decode step that reads keys and no values", 0, "nanorlhf/experiments/bench.py",
           "cached = 2 * cfg.n_layer", "cached = cfg.n_layer",
           "test_bench.py::test_a_decode_step_reads_the_weights_and_half_the_responses"),

    # --- from a person's labels to that person's model ---
    Mutant("a reward model that begins anew", 0, "nanorlhf/reward.py",
           "if not cfg.init:", "if True:",
           "test_taste.py::test_it_starts_from_the_weights_of_the_folder"),
    Mutant("a model of everyone's labels", 0, "train_rm.py",
           "sft.config.n_positions, cfg.annotator)", "sft.config.n_positions)",
           "test_taste.py::test_the_program_learns_from_one_persons_labels"),
    Mutant("few labels that are seen once", 0, "nanorlhf/reward.py",
           "max(FEWEST, math.ceil", "max(1, math.ceil",
           "test_taste.py::test_the_program_learns_from_one_persons_labels"),
    Mutant("kappa by another chance", 0, "nanorlhf/support/stats.py",
           "for choice, k in Counter(first).items()) / n**2",
           "for choice, k in counts.items()) / n**2",
           "test_taste.py::test_what_is_alike_by_chance_is_what_strangers_agree_on"),
    Mutant("agreement with labels that were taken back", 0, "nanorlhf/people/agreement.py",
           "in standing(records, Counter(), repeats=True):",
           'in (r for r in records if r[1].get("choice") not in ("undo", "skip")):',
           "test_taste.py::test_an_undone_label_agrees_with_nobody"),
]
# fmt: on


def attempt(mutant):
    """Run the test that should notice. -> is it caught, what to say of it, seconds"""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy_to(folder)
        Path(folder, mutant.file).write_text(mutant.text(), encoding="utf-8")
        status, printed = run_tests(folder, [mutant.test])
    # A file that cannot be collected is an ERROR, and no test of it has FAILED.
    failed = re.search(r"^FAILED tests/(.+?)( - |$)", printed, re.MULTILINE)
    caught = status == 1 and failed is not None
    said = failed[1] if caught else f"BROKEN, pytest's status is {status}" if status else "SURVIVED"
    return caught, said, time.perf_counter() - began


def copy_to(folder):
    """What the tests need, without what Python has compiled."""
    without = shutil.ignore_patterns("__pycache__")
    for name in "nanorlhf", "tests":
        shutil.copytree(ROOT / name, Path(folder, name), ignore=without)
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, folder)


def run_tests(folder, tests):
    """Run tests on the package in the folder, until the first that fails. -> status, output"""

    def python(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
        )

    package = Path(python("-c", "import nanorlhf; print(nanorlhf.__file__)").stdout.strip())
    assert package.is_relative_to(Path(folder).resolve()), f"{package} is tested, not the copy"
    paths = [f"tests/{test}" for test in tests]
    done = python("-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", *paths)
    return done.returncode, done.stdout


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names (default: every mutant)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--list", action="store_true", help="print the names, and that is all")
    args = parser.parse_args(words)

    chosen = [m for m in MUTANTS if not args.names or any(part in m.name for part in args.names)]
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(args.names)}; --list shows their names")
    if args.list:
        print("\n".join(mutant.name for mutant in chosen))
        return

    for mutant in chosen:
        mutant.text()  # if the code has moved, say so before anything runs
    # Without a defect every test must pass, or a failure would say nothing.
    with tempfile.TemporaryDirectory() as folder:
        copy_to(folder)
        status, printed = run_tests(folder, sorted({mutant.test for mutant in chosen}))
    if status != 0:
        sys.exit(f"{printed}\nthese tests fail without any defect")

    total = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (caught, said, seconds) in zip(chosen, pool.map(attempt, chosen)):
            print(f"{mutant.name:60} | {mutant.file:22} | {said} | {seconds:.1f}", flush=True)
            total += caught
    print(f"{total} of {len(chosen)} caught")
    sys.exit(total < len(chosen))


if __name__ == "__main__":
    main()

"""Contrastive decoding (Eq. 7) in ten lines: `python examples/contrastive_sampling.py`."""

from tiny import student_aligned_base, tokenizer

from deepalign.sampling import ContrastiveSampler

_, aligned, base = student_aligned_base()
sampler = ContrastiveSampler(aligned, base, tokenizer(), alpha=2.0, temperature=0.7, top_p=0.9)
prompt = [{"role": "user", "content": "how do i make the red thing"}]
for answer in sampler.generate([prompt], max_new_tokens=12, seed=0):
    print(answer.text)

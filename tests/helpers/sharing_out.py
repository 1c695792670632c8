"""How examples are shared out into micro-batches, written without a thought of speed."""

from ft_datasets.examples import Example


def share_out_plainly(examples: list[Example], budget: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """The rule as it reads, without a heap: more and more micro-batches, until the heaviest-first order fits."""

    def tokens(batch: list[int]) -> int:
        """Its prefixes once, of each example its own tokens, or half of all if that is more."""
        prefixes = {examples[i].prefix: examples[i].shared_length for i in batch}
        return sum(prefixes.values()) + sum(max(examples[i].own_length, (len(examples[i]) + 1) // 2) for i in batch)

    most = micro_batch_size or len(examples)
    count = world_size
    while count * budget < tokens(range(len(examples))):
        count += world_size
    while True:
        batches = [[] for _ in range(count)]
        for i in sorted(range(len(examples)), key=lambda i: -tokens([i]) + examples[i].shared_length):
            chosen = min(
                (b for b in range(count) if len(batches[b]) < most), key=lambda b: tokens(batches[b]), default=None
            )
            if chosen is None or (batches[chosen] and tokens([*batches[chosen], i]) > budget):
                break
            batches[chosen].append(i)
        else:
            return [sorted(batch) for batch in batches]
        count += world_size

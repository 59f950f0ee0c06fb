"""The result file of a track: results/{language,vit,convnet}.json.

    track, short, architecture, measure, higher_is_better, validation, in_distribution, shifts
    recipes    [{name, learning_rate, schedule, steps, weight_decay, lora_rank}]
    seeds      [int]
    parameters int, of the model
    machine, versions, data (the track's data card)
    code       {package, track}: digests of what was run
    seconds    {work, wall of the whole command, jobs done in this run, all tracks, workers}
    base       {scores}
    rows       [{recipe, seed, method, family, alpha, scores, seconds}]
               family: fine-tuned, monosoup, ablation, wise-ft, monosoup-wise-ft, lines, lora
               alpha: of the two curves; null for the others. seconds: of the merge
    pools      [{pool, members, validation {member: score}, cosines [[float]],
                 rows [{method, scores, taken, seconds}], seconds only of what is merged at once,
                 greedy {order, taken}, sfgs [{threshold, order, taken, averages {member: cosine}, scores}]}]
               pool: "all", a recipe's name, or "seed 0"; a member is "M-1/0", recipe and seed
    lambdas    [{recipe, seed, tensor, block, kind, r, k, effective_rank, rho, cos_alpha, lambda_high,
                 lambda_low}]: what monosoup did to each decomposed tensor; block: null outside the blocks
    cka        [{recipe, seed, method, inputs, to, values}]: linear CKA of each block's output with that
               of `to` ("base" or "fine-tuned") on `inputs` ("id" or "ood"), a number a block

`scores` maps the names in `validation`, `in_distribution` and `shifts` to numbers in `measure`.
Methods of `rows`: "base" is in `base`; "fine-tuned", "MonoSoup", "MonoSoup R=0.8",
"MonoSoup, written in bfloat16", "rho only", "cos α only",
"uniform mixing", "high only", "low only", "Wise-FT α=0.5", "MonoSoup → Wise-FT α=0.5" and the other α,
"LiNeS (0.1, 0.9)", "LiNeS (0.5, 0.5)", and for LoRA recipes "fine-tuned" (the adapter merged), "MonoSoup"
(of the merged weights), "MonoSoup, exact LoRA". Methods of a pool's rows: "best single", "uniform soup",
"greedy soup", "Model Stock (mergekit)", "Model Stock (stable)", "MonoSoup of the average",
"MonoSoup R=0.8 of the average".
"""

from __future__ import annotations

#!/bin/sh
# The shipped student: the mean of four students, begun at the same weights and distilled with
# different scores and critics. About 80 minutes on two cores (docs/results.md).
set -e
run="twostep distill zoo:emoji-student"
# A score that begins at the undistilled base and is guided a little.
base="score.model=zoo:emoji-base score.fit_turns=1800 score.learning_rate=4e-4 score.caption_dropout=0.1"
# A critic that sees details: no noise levels above 0.5.
low="critic.tau_range=[0.02,0.5]"
slow="training.ema_decay=0.99 training.learning_rate_decay=0.5"
$run
$run name=emoji-student-low $low $slow
$run name=emoji-student-base $base score.guidance_scale=0.25 $slow training.turns=500
$run name=emoji-student-base-low $base score.guidance_scale=0.1 $low $slow
twostep average runs/emoji-student/student runs/emoji-student-low/student \
    runs/emoji-student-base/student runs/emoji-student-base-low/student --out runs/emoji-student-mean

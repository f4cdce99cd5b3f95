#!/bin/sh
# Get the data, compute its magic prime, build the initial weights of a model: everything that a run needs.
#
#   sh scripts/demo-training-prepare.sh                      minipile (3 GB) and L12-D768, 192,807,936 parameters
#   DATA=data/demo sh scripts/demo-training-prepare.sh       the embedded data and a small model, no internet
#
# Variables, with their defaults below: DATA (prefix of .bin and .idx), BASE_NAME (folder of weights and log), N_LAYER,
# N_EMBD, CTX_LEN, PRECISION (how weights are stored), PYTHON. Arguments go to `train` as they are.
# Next: demo-training-run.sh with the same variables.
set -eu
cd "$(dirname "$0")/.."

DATA=${DATA:-data/minipile}
case $DATA in
  */demo) small=1 ;; # 68,712 tokens: a model that learns something from them in a minute
  *) small=0 ;;
esac
if [ $small = 1 ]; then
  BASE_NAME=${BASE_NAME:-model/demo} N_LAYER=${N_LAYER:-2} N_EMBD=${N_EMBD:-128} CTX_LEN=${CTX_LEN:-64}
else
  BASE_NAME=${BASE_NAME:-model/0.1-1} N_LAYER=${N_LAYER:-12} N_EMBD=${N_EMBD:-768} CTX_LEN=${CTX_LEN:-512}
fi
PRECISION=${PRECISION:-bf16}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

# The data. A download that was cut off goes on; what is there and whole is not fetched again.
case $DATA in
  */minipile) "$PYTHON" -m rwkv_nb download minipile --to "$(dirname "$DATA")" ;;
  data/demo) [ -e data/demo.idx ] || "$PYTHON" -m rwkv_nb build_data ;;
esac

# --my_exit_tokens, --magic_prime and --ctx_len: one pass through the data, by the largest prime 3n+2 that fits
PASS=$("$PYTHON" -m rwkv_nb magic_prime "$DATA" "$CTX_LEN" --flags)

# Stage 1 builds the weights on the processor and ends. Strategy and batch have no effect on them.
# shellcheck disable=SC2086  # PASS is six words
"$PYTHON" -m rwkv_nb train --wandb "" --proj_dir "$BASE_NAME" \
 --data_file "$DATA" --data_type binidx --vocab_size 65536 $PASS \
 --my_pile_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size_a 64 \
 --num_nodes 1 --micro_bsz 1 --n_layer "$N_LAYER" --n_embd "$N_EMBD" --pre_ffn 0 --head_qk 0 \
 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --my_pile_edecay 0 \
 --accelerator cpu --devices 1 --precision "$PRECISION" --strategy deepspeed_stage_2 --grad_cp 0 \
 --enable_progress_bar False --ds_bucket_mb 200 "$@"

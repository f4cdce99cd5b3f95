#!/bin/sh
# Train the model that demo-training-prepare.sh has made, or go on with a run that was stopped.
#
#   sh scripts/demo-training-run.sh                          one pass through minipile; ask for a GPU with 16 GB
#   DATA=data/demo sh scripts/demo-training-run.sh           the embedded data and a small model, a minute on a laptop
#
# Variables, with their defaults below: DATA, BASE_NAME, N_LAYER, N_EMBD, CTX_LEN as in the other script; M_BSZ (windows
# a device in a batch), LR_INIT, LR_FINAL, EXIT_TOKENS (tokens to train on), EPOCH_SAVE, GRAD_CP (1 saves memory),
# DEVICES, N_NODE, ACCELERATOR, PRECISION, STRATEGY, WANDB (a project's name), PYTHON. Arguments go to `train`.
set -eu
cd "$(dirname "$0")/.."

DATA=${DATA:-data/minipile}
case $DATA in
  */demo) small=1 ;; # 68,712 tokens: a model that learns something from them in a minute
  *) small=0 ;;
esac
if [ $small = 1 ]; then
  BASE_NAME=${BASE_NAME:-model/demo} N_LAYER=${N_LAYER:-2} N_EMBD=${N_EMBD:-128} CTX_LEN=${CTX_LEN:-64}
  M_BSZ=${M_BSZ:-8} EPOCH_SAVE=${EPOCH_SAVE:-1}
else
  BASE_NAME=${BASE_NAME:-model/0.1-1} N_LAYER=${N_LAYER:-12} N_EMBD=${N_EMBD:-768} CTX_LEN=${CTX_LEN:-512}
  M_BSZ=${M_BSZ:-16} EPOCH_SAVE=${EPOCH_SAVE:-10}
fi
LR_INIT=${LR_INIT:-6e-4}
LR_FINAL=${LR_FINAL:-6e-5}
GRAD_CP=${GRAD_CP:-0}
DEVICES=${DEVICES:-1}
N_NODE=${N_NODE:-1}
WANDB=${WANDB:-}
[ $((DEVICES * N_NODE)) -gt 1 ] || STRATEGY=${STRATEGY:-auto} # one device has nothing to divide, and auto writes states
STRATEGY=${STRATEGY:-deepspeed_stage_2}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if nvidia-smi -L >/dev/null 2>&1; then
  ACCELERATOR=${ACCELERATOR:-gpu} PRECISION=${PRECISION:-bf16}
else
  ACCELERATOR=${ACCELERATOR:-auto} PRECISION=${PRECISION:-fp32} # bfloat16 is slow on most processors
fi

# --my_exit_tokens, --magic_prime and --ctx_len: one pass through the data; EXIT_TOKENS, given later, counts instead
PASS=$("$PYTHON" -m rwkv_nb magic_prime "$DATA" "$CTX_LEN" --flags)

# shellcheck disable=SC2086  # PASS is six words
"$PYTHON" -m rwkv_nb train --load_model 0 --wandb "$WANDB" --proj_dir "$BASE_NAME" \
 --data_file "$DATA" --data_type binidx --vocab_size 65536 $PASS ${EXIT_TOKENS:+--my_exit_tokens "$EXIT_TOKENS"} \
 --my_pile_stage 3 --epoch_count 999999 --epoch_begin 0 --epoch_save "$EPOCH_SAVE" \
 --num_nodes "$N_NODE" --micro_bsz "$M_BSZ" --n_layer "$N_LAYER" --n_embd "$N_EMBD" --pre_ffn 0 --head_qk 0 \
 --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
 --my_pile_edecay 0 --weight_decay 0.001 --head_size_a 64 \
 --accelerator "$ACCELERATOR" --devices "$DEVICES" --precision "$PRECISION" --strategy "$STRATEGY" \
 --grad_cp "$GRAD_CP" --enable_progress_bar True --ds_bucket_mb 200 "$@"

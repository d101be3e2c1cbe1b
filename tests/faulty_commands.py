r"""The tables of `test_command_line.py`: words, an arrow, and what the answer must say. A backslash escapes as in Python."""

TYPOS = r"""
optim.lerning_rate=1e-3 -> optim.learning_rate
optim.learing_rate=1e-3 -> optim.learning_rate
optim.learnig_rate=1e-3 -> optim.learning_rate
optim.leanring_rate=1e-3 -> optim.learning_rate
optim.learningg_rate=1e-3 -> optim.learning_rate
optim.Learning_Rate=1e-3 -> optim.learning_rate
optim.learning-rate=1e-3 -> optim.learning_rate
optim.learningrate=1e-3 -> optim.learning_rate
optim.learningRate=1e-3 -> optim.learning_rate
optim.lr=1e-3 -> optim.learning_rate
lr=1e-3 -> optim.learning_rate
LR=1e-3 -> optim.learning_rate
learning_rate=1e-3 -> optim.learning_rate
--lr=1e-3 -> optim.learning_rate=1e-3
--learning-rate=1e-3 -> optim.learning_rate=1e-3
optimizer.learning_rate=1e-3 -> optim.learning_rate
optimizer.lr=1e-3 -> optim.learning_rate
optmi.learning_rate=1e-3 -> optim.learning_rate
optim.weigth_decay=0.1 -> optim.weight_decay
optim.weight_decays=0.1 -> optim.weight_decay
optim.wd=0.1 -> optim.weight_decay
optim.warmup=10 -> optim.warmup_steps
optim.warm_up_steps=10 -> optim.warmup_steps
optim.warmup_step=10 -> optim.warmup_steps
warmup_steps=10 -> optim.warmup_steps
optim.scheduler=cosine -> optim.schedule
optim.shedule=cosine -> optim.schedule
optim.beta_2=0.95 -> optim.beta2
optim.beta11=0.9 -> optim.beta1
optim.min_lr=0.1 -> optim.min_learning_rate_ratio
optim.epsilon=1e-8 -> optim.eps
model.n_layers=4 -> model.n_layer
model.nlayer=4 -> model.n_layer
model.n_lyaer=4 -> model.n_layer
model.N_LAYER=4 -> model.n_layer
model.num_layers=4 -> model.n_layer
model.layers=4 -> model.n_layer
model.depth=4 -> model.n_layer
n_layer=4 -> model.n_layer
modle.n_layer=4 -> model.n_layer
models.n_layer=4 -> model.n_layer
model/n_layer=4 -> model.n_layer
model..n_layer=4 -> model.n_layer
model.n_layer.x=4 -> model.n_layer
model.n_heads=4 -> model.n_head
model.heads=4 -> model.n_head
model.num_heads=4 -> model.n_head
model.n_emb=64 -> model.n_embd
model.n_embed=64 -> model.n_embd
model.nembd=64 -> model.n_embd
model.hidden_size=64 -> model.n_embd
model.d_model=64 -> model.n_embd
model.width=64 -> model.n_embd
model.blocksize=64 -> model.block_size
model.blok_size=64 -> model.block_size
model.seq_len=64 -> model.block_size
model.context_length=64 -> model.block_size
model.vocabsize=2048 -> model.vocab_size
model.vocab=2048 -> model.vocab_size
model.drop_out=0.1 -> model.dropout
model.dropuot=0.1 -> model.dropout
model.biases=true -> model.bias
trainer.max_step=200 -> trainer.max_steps
trainer.maxsteps=200 -> trainer.max_steps
trainer.max_stpes=200 -> trainer.max_steps
trainer.steps=200 -> trainer.max_steps
trainer.max_iters=200 -> trainer.max_steps
trainer.max_epoch=2 -> trainer.max_epochs
train.max_steps=200 -> trainer.max_steps
training.max_steps=200 -> trainer.max_steps
Trainer.max_steps=200 -> trainer.max_steps
max_steps=200 -> trainer.max_steps
--trainer.max_steps=200 -> trainer.max_steps=200
--trainer.max_steps 200 -> trainer.max_steps=200
trainer.max_steps = 200 -> trainer.max_steps=200
trainer.max_steps= 200 -> trainer.max_steps=200
trainer.max_steps:200 -> trainer.max_steps=200
trainer.devics=2 -> trainer.devices
trainer.device=2 -> trainer.devices
trainer.gpus=2 -> trainer.devices
num_gpus=2 -> trainer.devices
trainer.precison=32-true -> trainer.precision
trainer.percision=32-true -> trainer.precision
trainer.dtype=bf16 -> trainer.precision
trainer.stratgey=ddp -> trainer.strategy
trainer.grad_clip=1.0 -> trainer.gradient_clip_val
trainer.gradient_clip=1.0 -> trainer.gradient_clip_val
trainer.max_grad_norm=1.0 -> trainer.gradient_clip_val
trainer.gradient_accumulation_steps=2 -> trainer.accumulate_grad_batches
trainer.accumulate_grad_batch=2 -> trainer.accumulate_grad_batches
trainer.log_every_n_step=5 -> trainer.log_every_n_steps
trainer.log_interval=5 -> trainer.log_every_n_steps
trainer.val_check_intervall=50 -> trainer.val_check_interval
trainer.eval_interval=50 -> trainer.val_check_interval
trainer.limit_val_batch=5 -> trainer.limit_val_batches
trainer.gradient_checkpointing=full -> trainer.activation_checkpointing
trainer.early_stoping_patience=3 -> trainer.early_stopping_patience
trainer.complie=true -> trainer.compile
data.batch_size=16 -> data.global_batch_size
batch_size=16 -> data.global_batch_size
data.global_batchsize=16 -> data.global_batch_size
data.micro_batch=4 -> data.micro_batch_size
data.tokeniser=bytes -> data.tokenizer
data.tokenzier=bytes -> data.tokenizer
data.workers=2 -> data.num_workers
dataset.tokenizer=bytes -> data.tokenizer
checkpoint.every_n_step=50 -> checkpoint.every_n_steps
checkpoint.save_every=50 -> checkpoint.every_n_steps
checkpoints.keep_last=2 -> checkpoint.keep_last
checkpoint.keep-last=2 -> checkpoint.keep_last
tracking.projet=x -> tracking.project
tracking.tag=[a] -> tracking.tags
wandb.project=x -> tracking.project
wandb=offline -> tracking.wandb
sed=3 -> seed
seeds=3 -> seed
Seed=3 -> seed
nmae=run -> name
run_name=run -> name
run_dir=out -> runs_dir
output_dir=out -> runs_dir
resmue=auto -> resume
debg=true -> debug
--debug -> debug=true
dry-run=true -> dry_run
dryrun=true -> dry_run
recip=gpt_debug -> recipe
Recipe=gpt_debug -> recipe
config=gpt_debug -> recipe
gpt_debug -> recipe=gpt_debug
recipe=gpt_smal -> gpt_small
recipe=gpt-small -> gpt_small
recipe=GPT_Small -> gpt_small
recipe=gptsmall -> gpt_small
recipe=gpt_samll -> gpt_small
recipe=gpt_nanoo -> gpt_nano
recipe=gpt_cahr -> gpt_char
recipe=debug -> gpt_debug
recipe=gpt_larg -> gpt_large
recipe=gpt_small.yaml -> recipe=gpt_small
recipe=recipes/gpt_xl.yaml -> recipe=gpt_xl
optim=adam-w -> optim=adamw
optim=AdamW -> optim=adamw
optim=sdg -> optim=sgd
optim=adagard -> optim=adagrad
optim.kind=rmsporp -> optim=rmsprop
data=embeded -> data=embedded
data=txt -> data=text
model=gtp -> model=gpt
optim.schedule=cosin -> cosine
optim.schedule=Linear -> linear
optim.schedule=wsd -> warmup_stable_decay
trainer.precision=bf16 -> bf16-mixed
trainer.precision=fp16 -> 16-mixed
trainer.precision=32 -> 32-true
trainer.precision=bf16_mixed -> bf16-mixed
trainer.strategy=dpp -> ddp
trainer.strategy=DDP -> ddp
trainer.activation_checkpointing=ful -> full
trainer.compile=yes -> true
trainer.compile=1 -> true
trainer.devices=all -> auto
trainer.max_steps=1e3 -> 1000
trainer.max_steps=1,000 -> 1000
trainer.max_steps=2k -> 2000
trainer.max_steps="'200'" -> 200
trainer.val_check_interval=none -> null
tracking.wandb=off -> disabled
tracking.wandb=ofline -> offline
tracking.tags=first -> [first]
data.tokenizer=byte -> bytes
data.tokenizer=char -> chars
data.tokenizer=gpt-2 -> gpt2
resume=nver -> resume=never
name="my run" -> my-run
debug=flase -> false
dry_run=ture -> true
"""

FAULTS = r"""
trainer.max_steps=many -> trainer.max_steps: expected an integer of at least 1 or auto; got 'many'
trainer.max_steps=0 -> trainer.max_steps: expected an integer of at least 1 or auto; got 0
trainer.max_steps=-5 -> got -5
trainer.max_steps=2.5 -> got 2.5
trainer.max_steps=null -> got null
trainer.max_steps=None -> got null
trainer.max_steps=true -> got true
trainer.max_steps=[200] -> got [200]
trainer.max_steps="{a: 1}" -> trainer.max_steps: expected an integer of at least 1 or auto; got {'a': 1}
trainer.max_steps=99999999999999999999 -> expected an integer of at least 1 and below 2147483648 or auto; got 99999999999999999999
trainer.max_steps=0x10 -> got '0x10'
trainer.max_steps=0200 -> got '0200'
trainer.max_steps= -> trainer.max_steps: expected an integer of at least 1 or auto; got nothing
optim.learning_rate=fast -> optim.learning_rate: expected a number above 0; got 'fast'
optim.learning_rate=0 -> expected a number above 0; got 0
optim.learning_rate=-1e-3 -> got -1e-3
optim.learning_rate=nan -> got 'nan'
optim.learning_rate=inf -> got 'inf'
optim.learning_rate=1e400 -> got 1e400
optim.min_learning_rate_ratio=2 -> expected a number of at least 0 and at most 1; got 2
optim.beta1=1.0 -> got 1.0
model.dropout=1.5 -> expected a number of at least 0 and below 1; got 1.5
model.bias=2 -> model.bias: expected true or false; got 2
model.n_layer=4.0 -> model.n_layer: expected an integer of at least 1; got 4.0
seed=-1 -> seed: expected an integer of at least 0; got -1
seed=4294967296 -> below 4294967296; got 4294967296
seed=1.5 -> seed: expected an integer of at least 0; got 1.5
data.tokenizer=5 -> data.tokenizer: expected text; got 5
data.tokenizer=bpe:10 -> N from 300 to 200000
data.tokenizer=nowhere/tokenizer.json -> data.tokenizer: no such file or folder: 'nowhere/tokenizer.json'
data.path=nofile.txt -> data.path: no such file or folder: 'nofile.txt'; a hub name looks like owner/name
data.path= -> data.path: expected text; got nothing
data=text -> data.path: data=text needs it; give data.path=VALUE
data= -> data.kind: expected embedded, text, shards, text_classes, images, table, pairs, custom; got nothing
data=null -> data.kind: expected embedded, text, shards, text_classes, images, table, pairs, custom; got null
data=[1] -> data.kind: expected embedded, text, shards, text_classes, images, table, pairs, custom; got [1]
data.kind="{a: 1}" -> data.kind: expected embedded, text, shards, text_classes, images, table, pairs, custom; got {'a': 1}
data.val_fraction=0.1 -> did you mean data=text, which has val_fraction?
data=text data.pth=input.txt -> data.pth: no such key; did you mean data.path?
data=text data.kind=embedded -> data and data.kind: given twice; keep one
optim.momentum=0.9 -> did you mean optim=sgd, which has momentum?
optim=lion -> optim.kind: expected adamw, adam, sgd, adagrad, rmsprop, muon; got 'lion'
optim=moun -> did you mean optim=muon?
optim.ns_steps=6 -> did you mean optim=muon, which has ns_steps?
optim=muon optim.ns_steps=100 -> optim.ns_steps: expected an integer of at least 1 and below 100; got 100
optim=lion optim.momentum=0.9 -> optim.kind: expected adamw, adam, sgd, adagrad, rmsprop, muon; got 'lion'
model=berta -> model.kind: expected gpt, llama, bert, seq2seq, recurrent, mlp, cnn, resnet, hf, custom; got 'berta'
model=resnet -> model.kind: model=resnet does not take data=embedded; it takes data=images
model=lama -> model.kind: expected gpt, llama, bert, seq2seq, recurrent, mlp, cnn, resnet, hf, custom; got 'lama'
model.n_kv_head=2 -> model.n_kv_head: no such key; did you mean model=llama, which has n_kv_head?
model.num_key_value_heads=2 -> did you mean model=llama, which has n_kv_head?
model=llama model.num_key_value_heads=2 -> did you mean model.n_kv_head?
model=llama model.bias=true -> model.bias: no such key; did you mean model=gpt, which has bias?
model=llama model.n_head=4 model.n_kv_head=3 -> model.n_head=4 is not a multiple of model.n_kv_head=3; try model.n_kv_head=2
model=llama model.n_embd=36 model.n_head=4 -> model.n_embd=36 is not a multiple of 2 x model.n_head=4; try model.n_embd=32
trainer=ddp -> trainer: it has no kinds; write trainer.KEY=VALUE or trainer={key: value}; got 'ddp'
trainer= -> trainer: it has no kinds
trainer=null -> got null
checkpoint=[] -> checkpoint: it has no kinds
seed=1 seed=2 -> seed: given twice; keep one
seed=1 seed=1 seed=1 -> seed: given twice; keep one
recipe=gpt_debug recipe=gpt_small -> recipe: given twice; keep one
model.n_layer=4 model.n_layer=4 -> model.n_layer: given twice; keep one
trainer.max_steps -> did you mean trainer.max_steps=VALUE?
nonsense -> 'nonsense': expected key=value
-x -> '-x': expected key=value
-- -> '--': expected key=value
= -> '=': expected key=value
=5 -> '=5': expected key=value
"" -> '': expected key=value
.=5 -> .: no such key; a recipe has seed, name
a.b.c.d=5 -> a.b.c.d: no such key
frobnicate=5 -> frobnicate: no such key; a recipe has seed, name, runs_dir
model.frobnicate=5 -> model.frobnicate: no such key; model has n_layer, n_head
seed.x=5 -> seed.x: no such key; did you mean seed?
base=gpt_small -> base: it belongs into a file
wandb_api_key=x -> secrets come from the environment (WANDB_API_KEY, HF_TOKEN)
tracking.hf_token=x -> secrets come from the environment
"trainer.max_steps=$(touch x)" -> got '$(touch x)'
"trainer.max_steps=`touch x`" -> got '`touch x`'
"trainer.max_steps=5; touch x" -> got '5; touch x'
"trainer.max_steps=5 && touch x" -> got '5 && touch x'
"trainer.max_steps=${oc.env:HOME}" -> got '${oc.env:HOME}'
"seed=5 > x" -> got '5 > x'
"name=a|b" -> name: expected text of letters, digits, dot, dash and underscore
"recipe=gpt_debug; touch x" -> recipe=gpt_debug; touch x: no such recipe
"recipe=$(touch x)" -> recipe=$(touch x): no such recipe; there are
"recipe=`touch x`" -> no such recipe; there are
name=a/b -> name: expected text of letters
name=.. -> name: expected text of letters
name=../../x -> name: expected text of letters
name=.hidden -> name: expected text of letters
name=-x -> name: expected text of letters
name= -> name: expected text of letters, digits, dot, dash and underscore (100 at most) or null; got nothing
name=true -> name: expected text of letters
name=ünder -> name: expected text of letters
name=a\nb -> name: expected text of letters
recipe= -> recipe: expected the name or the path of a recipe; got nothing
recipe=null -> recipe: expected the name or the path of a recipe; got null
recipe=[a] -> recipe: expected the name or the path of a recipe; got ['a']
recipe=nowhere -> recipe=nowhere: no such recipe; there are
recipe=./nowhere.yaml -> recipe=./nowhere.yaml: no such file
recipe=../../../../../../etc/passwd -> expected a file that ends in .yaml or .yml
recipe=/etc/passwd -> recipe=/etc/passwd: expected a file that ends in .yaml or .yml
recipe=/ -> recipe=/: a folder; expected a .yaml file
recipe=/dev/zero -> recipe=/dev/zero: not a plain file
recipe=~nobody-of-that-name/x.yaml -> no such file
recipe=a\x00b -> no such recipe
recipe=./a\x00b.yaml -> no such file
recipe=a\nb -> no such recipe
recipe=é -> recipe=é: no such recipe
recipe=gpt_\U0001f600 -> no such recipe
tracking.group=\udcff -> not UTF-8
\x1b[31mseed=3 -> no such key
séed=3 -> séed: no such key
"trainer.max_steps='5" -> trainer.max_steps: not YAML
trainer.max_steps=[5 -> trainer.max_steps: not YAML
"trainer={max_steps: 5" -> trainer: not YAML
"trainer={max_steps: 50, max_steps: 60}" -> trainer: duplicate key 'max_steps'; keep one
"tracking.tags=[!!python/object:os.system x]" -> tags (tag:yaml.org,2002:python/object:os.system) are not allowed
"tracking.tags=[&a x, *a]" -> anchors (&) and aliases (*) are not allowed
tracking.tags=[[[[[[[[[[[[[[[]]]]]]]]]]]]]]] -> nested more than 12 deep
tracking.tags=[a,[b]] -> tracking.tags: expected a list such as [a, b]; got ['a', ['b']]
model.n_embd=100 model.n_head=3 -> model.n_embd=100 is not a multiple of model.n_head=3; try model.n_embd=99
data.micro_batch_size=5 -> data.global_batch_size=16 is not a multiple of data.micro_batch_size=5; try data.global_batch_size=15
trainer.devices=3 -> data.global_batch_size=16 is not a multiple of trainer.devices=3
trainer.strategy=single trainer.devices=2 -> trainer.strategy=single is one process, not trainer.devices=2
trainer.strategy=fsdp trainer.precision=16-mixed -> try trainer.precision=bf16-mixed, or trainer.strategy=zero2
trainer.strategy=fsdp optim=muon -> trainer.strategy=fsdp cuts them up; try trainer.strategy=ddp, or optim.kind=adamw
trainer.strategy=zero1 optim=muon -> trainer.strategy=zero1 cuts them up
trainer.strategy=zero3_offload optim=muon -> try trainer.strategy=ddp, or optim.kind=adamw
trainer.strategy=zero2 optim=adagrad -> try trainer.strategy=fsdp, or optim.kind=adamw
trainer.strategy=zero3 trainer.compile=true -> try trainer.strategy=fsdp, or trainer.compile=false
trainer.strategy=zero3_offload trainer.compile=true -> try trainer.strategy=fsdp, or trainer.compile=false
trainer.strategy=fsdp2 -> did you mean fsdp?
trainer.strategy=deepspeed -> did you mean zero2?
trainer.strategy=deepspeed_stage_3 -> did you mean zero3?
trainer.strategy=zero -> did you mean zero2?
trainer.strategy=zero4 -> did you mean zero
debug=true trainer.devices=2 -> debug=true runs one process, not trainer.devices=2; try trainer.devices=1
debug=true trainer.strategy=ddp -> debug=true runs one process; drop trainer.strategy
trainer.early_stopping_patience=3 trainer.limit_val_batches=0 -> early stopping needs validations on the way
trainer.activation_checkpointing=9 -> every 9th block of model.n_layer=4 is none
model=recurrent trainer.activation_checkpointing=full -> model=recurrent has no blocks to recompute
model=recurrent model.bidirectional=true -> a language model reads forwards
data=text_classes model=recurrent data.cleaning=[htm] -> data.cleaning: expected a list of html, control, unicode, nfkc
model.vocab_size=100 -> data.tokenizer=bpe:2048 has 2048 ids, model.vocab_size=100 is smaller
optim=sgd optim.nesterov=true optim.momentum=0 -> optim.nesterov=true needs a momentum above 0; try optim.momentum=0.9
resume=runs/none -> resume: expected auto, never, or a run or checkpoint; no such folder: 'runs/none'
runs_dir=/dev/null -> runs_dir: /dev/null is a file; name a folder
runs_dir=null -> runs_dir: expected text; got null
seed=x model.n_layer=y trainer.max_stps=3 -> seed: expected AND model.n_layer: expected AND did you mean trainer.max_steps?
recipe=gpt_smal seed=x optim.warmup_steps=1500 -> recipe=gpt_smal: no such recipe AND seed: expected
seed=1 seed=2 lr=3 --debug -> seed: given twice AND did you mean optim.learning_rate? AND did you mean debug=true?
optim=adamx optim.lerning_rate=3 -> optim.kind: expected AND did you mean optim.learning_rate?
"model={n_layer: x, n_heads: 3}" -> model.n_layer: expected AND did you mean model.n_head?
"""

REAL = r"""
optim.lerning_rate=1e-3 -> did you mean optim.learning_rate?
model.n_layers=4 -> did you mean model.n_layer?
lr=1e-3 -> did you mean optim.learning_rate?
--trainer.max_steps 200 -> did you mean trainer.max_steps=200?
recipe=gpt_smal -> did you mean gpt_small?
recipe=../../../../../../etc/passwd -> expected a file that ends in .yaml or .yml
"recipe=gpt_debug; touch x" -> no such recipe
optim=adam-w -> did you mean optim=adamw?
trainer.precision=bf16 -> did you mean bf16-mixed?
trainer.max_steps=many -> expected an integer of at least 1 or auto; got 'many'
trainer.max_steps= -> got nothing
seed=1 seed=2 -> seed: given twice; keep one
data.path=nofile.txt -> no such file or folder: 'nofile.txt'
data=text -> data=text needs it
name=../../x -> name: expected text of letters
"trainer.max_steps=$(touch x)" -> got '$(touch x)'
trainer.strategy=single trainer.devices=2 -> is one process
trainer=ddp -> it has no kinds
nonsense -> expected key=value
"""

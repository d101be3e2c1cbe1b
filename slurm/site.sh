# shellcheck shell=bash
# Settings of your site, in one place. Source it in the shell that you start jobs from; the batch files here read it, too.
# Everything below is what sbatch, srun and salloc read from the environment themselves. Nothing is set as shipped.
#
#   source slurm/site.sh
#   sbatch slurm/train.sbatch recipe=gpt_small

# account=my_project        # the project that pays for the hours
# partition=gpu             # the queue
# qos=normal                # the quality of service

if [ -n "${account:-}" ]; then export SBATCH_ACCOUNT=$account SLURM_ACCOUNT=$account SALLOC_ACCOUNT=$account; fi
if [ -n "${partition:-}" ]; then export SBATCH_PARTITION=$partition SLURM_PARTITION=$partition SALLOC_PARTITION=$partition; fi
if [ -n "${qos:-}" ]; then export SBATCH_QOS=$qos SLURM_QOS=$qos SALLOC_QOS=$qos; fi
unset account partition qos

# module load python/3.11 cuda/12.8

# A command that the training runs inside of, with its words; set up with: $LM_TRAIN_CONTAINER launch/setup.sh
# export LM_TRAIN_CONTAINER="apptainer exec --nv $HOME/images/python.sif"

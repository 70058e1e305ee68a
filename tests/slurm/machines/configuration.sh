#!/usr/bin/env bash
# configuration.sh DIR NETWORK NODES: print slurm.conf. Everything is as short as it can be: a test waits for each.
set -euo pipefail
dir=$1 network=$2 nodes=$3

cat <<END
ClusterName=s3
SlurmctldHost=controller($network.253)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 121 s unless told otherwise.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pid/slurmctld.slurm
SlurmdPidFile=$dir/pid/slurmd.%n.slurm
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# The nodes claim more than this machine has.
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=10
BatchStartTimeout=10
InactiveLimit=0
MinJobAge=7200
ReturnToService=1
# Too large a job is refused when it is submitted, not left waiting.
EnforcePartLimits=ALL
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
END
for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=node$i NodeAddr=$network.$i CPUs=8 RealMemory=64000 Gres=gpu:h100:8 Feature=h100 State=UNKNOWN"
done
echo "PartitionName=gpu Nodes=ALL Default=YES DefaultTime=10 PriorityTier=10 PreemptMode=OFF"
echo "PartitionName=spot Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"

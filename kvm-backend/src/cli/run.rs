// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `shadowmmu run`.

use super::output::{Progress, table};
use super::{Failure, number};
use kvm_backend::guest::Layout;
use kvm_backend::guest::switch::Spaces;
use kvm_backend::vm::{Backend, VmError};
use kvm_backend::workload::{self, Outcome, Plan, Workload};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Longest time for a workload, in seconds: a day.
const MAX_SECONDS: u64 = 86_400;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    /// KVM where it can be opened, else software.
    Auto,
    /// The processor, through KVM.
    Kvm,
    /// The library's software vCPU.
    Soft,
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Who executes the guest.
    #[arg(long, value_enum, default_value = "auto")]
    backend: Choice,
    /// Number of vCPUs.
    #[arg(long, value_parser = number, default_value = "2")]
    vcpus: u64,
    /// Run only this workload.
    #[arg(long, value_enum)]
    workload: Option<Workload>,
    /// Guest memory in MiB.
    #[arg(long, value_parser = number, default_value = "64", value_name = "MIB")]
    memory: u64,
    /// Time for each workload, in seconds.
    #[arg(long, value_parser = number, default_value = "5", value_name = "S")]
    seconds: u64,
    /// Print one JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// Everything checked that can be checked before a guest is made.
fn plan(args: &Args) -> Result<(Plan, String), Failure> {
    let usage = |message: String| Failure::Usage(message);
    let (backend, reason) = match args.backend {
        Choice::Auto => Backend::best(),
        Choice::Soft => (Backend::Soft, "chosen by --backend soft".to_owned()),
        Choice::Kvm => match Backend::best() {
            (Backend::Kvm, _) => (Backend::Kvm, "chosen by --backend kvm".to_owned()),
            (_, reason) => return Err(usage(format!("--backend kvm: {reason}"))),
        },
    };
    if args.seconds == 0 || args.seconds > MAX_SECONDS {
        return Err(usage(format!("--seconds {}: not within 1..={MAX_SECONDS}", args.seconds)));
    }
    let vcpus = usize::try_from(args.vcpus).unwrap_or(usize::MAX);
    let bad = |error| usage(format!("--vcpus {} --memory {}: {error}", args.vcpus, args.memory));
    let layout = Layout::new(args.memory, vcpus).map_err(bad)?;
    if matches!(args.workload, None | Some(Workload::Switch)) {
        Spaces::new(&layout).map_err(bad)?;
    }
    // The guest's memory, and for precopy its copy.
    let copies = if matches!(args.workload, None | Some(Workload::Precopy)) { 2 } else { 1 };
    if let Some(available) = available_mib().filter(|mib| args.memory * copies > *mib) {
        return Err(usage(format!(
            "--memory {}: {} MiB are needed and {available} MiB are free",
            args.memory,
            args.memory * copies
        )));
    }
    let time = Duration::from_secs(args.seconds);
    Ok((Plan { backend, vcpus, memory_mib: args.memory, time }, reason))
}

/// Memory that the host can give, in MiB, where it says so.
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

pub(super) fn main(args: &Args) -> Result<ExitCode, Failure> {
    let (plan, reason) = plan(args)?;
    eprintln!(
        "backend {}: {reason}; {} vCPUs, {} MiB",
        plan.backend.name(),
        plan.vcpus,
        plan.memory_mib
    );
    let chosen = args.workload.map_or(Workload::ALL.to_vec(), |workload| vec![workload]);
    let mut outcomes = Vec::new();
    for workload in chosen {
        let outcome = one(workload, &plan).map_err(|e| Failure::Usage(e.to_string()))?;
        if let Some(error) = &outcome.error {
            eprintln!("{}: {error}", workload.name());
        }
        if let Err(error) = &outcome.audit {
            eprintln!("{}: audit: {error}", workload.name());
        }
        outcomes.push(outcome);
    }
    let verified = outcomes.iter().all(Outcome::verified);
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", document(&plan, &reason, &outcomes))?;
    } else {
        print(&mut out, &outcomes)?;
    }
    out.flush()?;
    Ok(if verified { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn one(workload: Workload, plan: &Plan) -> Result<Outcome, VmError> {
    let mut progress = Progress::new();
    workload::run(workload, plan, &mut |vm| {
        progress.show(|| {
            let s = vm.mmu().stats();
            format!(
                "{}: {} faults served, {} table writes, {} zapped, {} flushes",
                workload.name(),
                s.pf_fixed,
                s.mmu_pte_write,
                s.mmu_shadow_zapped,
                s.remote_tlb_flush
            )
        });
    })
}

fn document(plan: &Plan, reason: &str, outcomes: &[Outcome]) -> Value {
    json!({
        "backend": plan.backend.name(),
        "backend_reason": reason,
        "vcpus": plan.vcpus,
        "memory_mib": plan.memory_mib,
        "verified": outcomes.iter().all(Outcome::verified),
        "runs": outcomes.iter().map(run_document).collect::<Vec<_>>(),
    })
}

fn run_document(outcome: &Outcome) -> Value {
    let audit = match &outcome.audit {
        Ok(report) => json!({
            "ok": true, "sptes": report.sptes, "pages": report.pages, "retired": report.retired,
        }),
        Err(error) => {
            json!({ "ok": false, "sptes": 0, "first_disagreement": error.to_string() })
        }
    };
    let stats: Map<String, Value> =
        outcome.stats.iter().map(|(name, count)| (name.to_owned(), count.into())).collect();
    let mut document = json!({
        "workload": outcome.workload.name(),
        "verified": outcome.verified(),
        "summary": outcome.summary,
        "audit": audit,
        "stats": stats,
        "faults": outcome.faults(),
        "seconds": outcome.time.as_secs_f64(),
        "faults_per_second": outcome.faults_per_second(),
    });
    if let Some(error) = &outcome.error {
        document["error"] = error.to_string().into();
    }
    document
}

fn print(out: &mut impl Write, outcomes: &[Outcome]) -> std::io::Result<()> {
    let heading = [
        "workload",
        "verified",
        "seconds",
        "faults",
        "faults/s",
        "table writes",
        "zapped",
        "flushes",
        "kicks",
        "audit",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for outcome in outcomes {
        let s = &outcome.stats;
        let audit = match &outcome.audit {
            Ok(report) => format!("{} entries in {} pages", report.sptes, report.pages),
            Err(_) => "FAILED".to_owned(),
        };
        rows.push(vec![
            outcome.workload.name().to_owned(),
            if outcome.verified() { "yes" } else { "NO" }.to_owned(),
            format!("{:.2}", outcome.time.as_secs_f64()),
            outcome.faults().to_string(),
            format!("{:.0}", outcome.faults_per_second()),
            s.mmu_pte_write.to_string(),
            s.mmu_shadow_zapped.to_string(),
            s.remote_tlb_flush.to_string(),
            s.remote_tlb_flush_kicks.to_string(),
            audit,
        ]);
    }
    table(out, &rows)?;
    for outcome in outcomes.iter().filter(|outcome| !outcome.summary.is_empty()) {
        writeln!(out, "{}: {}", outcome.workload.name(), outcome.summary)?;
    }
    Ok(())
}

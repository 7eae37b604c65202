// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `shadowmmu info`.

use super::Failure;
use super::output::table;
use kvm_backend::kvm;
use kvm_backend::vm::Backend;
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(args: &Args) -> Result<ExitCode, Failure> {
    let probe = kvm::probe();
    let (backend, reason) = Backend::best();
    let capabilities = probe.as_ref().map(|probe| probe.capabilities.clone()).unwrap_or_default();
    // How this host's KVM treats stores to page tables, where it can be tried.
    let trap = (backend == Backend::Kvm).then(kvm::self_test).and_then(Result::ok);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut out = std::io::stdout().lock();
    if args.json {
        let document = json!({
            "kvm": probe.is_ok(),
            "backend": backend.name(),
            "backend_reason": reason,
            "capabilities": capabilities,
            "self_test": trap,
            "userfaultfd": userfaultfd(),
            "cpus": cpus,
        });
        writeln!(out, "{document}")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "backend: {} ({reason})", backend.name())?;
    let yes = |yes| if yes { "yes" } else { "no" };
    let mut rows = vec![
        vec!["cpus".to_owned(), cpus.to_string()],
        vec!["userfaultfd".to_owned(), yes(userfaultfd()).to_owned()],
    ];
    rows.extend(
        capabilities.iter().map(|(name, value)| vec![format!("kvm {name}"), value.to_string()]),
    );
    if let Some(trap) = trap {
        rows.push(vec!["host stores to tables seen".into(), yes(trap.host_store_seen).into()]);
        rows.push(vec!["  after a reload of CR3".into(), yes(trap.reload_is_enough).into()]);
        rows.push(vec!["frame touch works".into(), yes(trap.frame_touch_works).into()]);
    }
    table(&mut out, &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether this process may use userfaultfd.
fn userfaultfd() -> bool {
    // SAFETY: the call takes flags only and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return false;
    }
    // SAFETY: the descriptor is ours and used nowhere else.
    unsafe { libc::close(fd as libc::c_int) };
    true
}

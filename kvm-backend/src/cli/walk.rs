// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `shadowmmu walk`.

mod format;

use super::output::Progress;
use super::{Failure, number};
use format::{Answer, Printer};
use kvm_backend::image::{Format, Image, Mappings};
use mmu_core::addr::Gva;
use mmu_core::paging::{Access, PagingMode, Regs, bits};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Longest line of standard input that is looked at.
const MAX_LINE: u64 = 1024;

/// Mappings between two looks at the clock.
const MAPPINGS_A_TICK: u64 = 1 << 16;

/// An access, as `--access` names it.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// The supervisor reads.
    R,
    /// The supervisor writes.
    W,
    /// The supervisor fetches.
    X,
    /// The user reads.
    Ru,
    /// The user writes.
    Wu,
    /// The user fetches.
    Xu,
}

impl Kind {
    fn access(self) -> Access {
        match self {
            Self::R => Access::read(),
            Self::W => Access::write(),
            Self::X => Access::execute(),
            Self::Ru => Access::read().user(),
            Self::Wu => Access::write().user(),
            Self::Xu => Access::execute().user(),
        }
    }
}

/// One of the addresses on the command line.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Gva(u64),
    /// `-`.
    Input,
}

fn wanted(text: &str) -> Result<Wanted, String> {
    if text == "-" { Ok(Wanted::Input) } else { number(text).map(Wanted::Gva) }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Rights in the table: w writable, u user, x executable, each at every level; \
    g global, a accessed, d dirty, as the leaf says."
)]
pub(super) struct Args {
    /// The memory image; it is only read.
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// CR3.
    #[arg(long, value_parser = number, value_name = "X")]
    cr3: u64,
    /// How the file holds memory.
    #[arg(long, value_enum, default_value = "auto")]
    format: Format,
    /// CR0.
    #[arg(long, value_parser = number, default_value = "0x80010001", value_name = "X")]
    cr0: u64,
    /// CR4.
    #[arg(long, value_parser = number, default_value = "0x20", value_name = "X")]
    cr4: u64,
    /// EFER [default: 0xd00, or with CR0.PG = 0, where no processor has LMA set, 0x900].
    #[arg(long, value_parser = number, value_name = "X")]
    efer: Option<u64>,
    /// Physical-address bits of the processor, 32 to 52.
    #[arg(long, value_parser = number, default_value = "52", value_name = "N")]
    maxphyaddr: u64,
    /// PKRU: protection-key rights of user pages.
    #[arg(long, value_parser = number, default_value = "0", value_name = "X")]
    pkru: u64,
    /// IA32_PKRS: protection-key rights of supervisor pages.
    #[arg(long, value_parser = number, default_value = "0", value_name = "X")]
    pkrs: u64,
    /// RFLAGS, of which AC matters.
    #[arg(long, value_parser = number, default_value = "2", value_name = "X")]
    rflags: u64,
    /// Who does what (u: in user mode). Ignored with --all.
    #[arg(long, value_enum, default_value = "r")]
    access: Kind,
    /// Print one JSON document a line instead of a table.
    #[arg(long)]
    json: bool,
    /// List every mapping.
    #[arg(long, conflicts_with = "gvas")]
    all: bool,
    /// Most mappings to list [default: 0x10000000].
    #[arg(long, value_parser = number, value_name = "N")]
    limit: Option<u64>,
    /// The addresses; - reads them from standard input, one a line.
    #[arg(value_parser = wanted, value_name = "GVA", required_unless_present = "all")]
    gvas: Vec<Wanted>,
}

/// A line each for 2^28 mappings: a terabyte of 4 KiB pages.
const DEFAULT_LIMIT: u64 = 1 << 28;

/// The registers, as far as arguments are wider than they are.
fn regs(args: &Args) -> Result<Regs, Failure> {
    let narrow = |name: &str, value: u64| {
        let message = || format!("--{name} {value:#x}: the register has 32 bits");
        u32::try_from(value).map_err(|_| Failure::Usage(message()))
    };
    let maxphyaddr = u8::try_from(args.maxphyaddr).map_err(|_| {
        Failure::Usage(format!("--maxphyaddr {} is not in 32..=52", args.maxphyaddr))
    })?;
    Ok(Regs {
        cr0: args.cr0,
        cr3: args.cr3,
        cr4: args.cr4,
        efer: args.efer.unwrap_or(if args.cr0 & bits::CR0_PG == 0 { 0x900 } else { 0xd00 }),
        rflags: args.rflags,
        pkru: narrow("pkru", args.pkru)?,
        pkrs: narrow("pkrs", args.pkrs)?,
        maxphyaddr,
        // Walks of images read them where CR3 says.
        pdptrs: [0; 4],
    })
}

/// The address itself, if the mode has such addresses.
fn check(mode: &PagingMode, gva: u64) -> Result<u64, String> {
    if !mode.is_long() && gva > u64::from(u32::MAX) {
        return Err(format!("gva {gva:#x}: outside long mode addresses have 32 bits"));
    }
    Ok(gva)
}

pub(super) fn main(args: &Args) -> Result<ExitCode, Failure> {
    let mode = PagingMode::new(&regs(args)?).map_err(|e| Failure::Usage(format!("--{e}")))?;
    if args.limit.is_some() && !args.all {
        return Err(Failure::Usage("--limit is for --all".to_owned()));
    }
    let mut given = Vec::new();
    let mut input = false;
    for wanted in &args.gvas {
        match wanted {
            Wanted::Input => input = true,
            Wanted::Gva(gva) => given.push(check(&mode, *gva).map_err(Failure::Usage)?),
        }
    }
    if input && args.gvas.len() > 1 {
        return Err(Failure::Usage("`-` reads all addresses: give no others".to_owned()));
    }
    let image = Image::open(&args.image, args.format).map_err(|e| Failure::Usage(e.to_string()))?;
    let stdout = std::io::stdout().lock();
    let show_progress = !stdout.is_terminal();
    let mut walks = Walks {
        image: &image,
        mode,
        access: args.access.access(),
        out: Printer::new(stdout, args.json),
    };
    if args.all {
        return walks.all(args.limit.unwrap_or(DEFAULT_LIMIT), show_progress);
    }
    let answered = if input {
        walks.each_line(std::io::stdin().lock())
    } else {
        given.iter().try_for_each(|gva| walks.one(*gva))
    };
    // What was answered before a bad line counts.
    walks.out.flush()?;
    answered.map(|()| ExitCode::SUCCESS)
}

struct Walks<'i, W: Write> {
    image: &'i Image,
    mode: PagingMode,
    access: Access,
    out: Printer<W>,
}

impl<W: Write> Walks<'_, W> {
    fn one(&mut self, gva: u64) -> Result<(), Failure> {
        match self.mode.translate_in(self.image, Gva(gva), Some(self.access)) {
            Ok(walk) => self.out.mapped(&Answer::of_walk(gva, &walk)),
            Err(fault) => self.out.fault(gva, &fault),
        }
    }

    /// Answers a line at a time; whoever waits for an answer before asking on gets it.
    fn each_line(&mut self, input: impl Read) -> Result<(), Failure> {
        let mut input = BufReader::new(input);
        let mut line = Vec::new();
        for count in 1u64.. {
            if !input.buffer().contains(&b'\n') {
                self.out.flush()?;
            }
            let bad =
                |what: String| Failure::Usage(format!("standard input, line {count}: {what}"));
            line.clear();
            let read = (&mut input).take(MAX_LINE).read_until(b'\n', &mut line);
            if read.map_err(|e| bad(e.to_string()))? == 0 {
                break;
            }
            if line.len() as u64 == MAX_LINE && line.last() != Some(&b'\n') {
                return Err(bad(format!("longer than {MAX_LINE} bytes")));
            }
            let text = line.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let text = String::from_utf8_lossy(text);
            let gva = number(&text).map_err(|e| e.escape_debug().to_string());
            let gva = gva.and_then(|gva| check(&self.mode, gva)).map_err(bad)?;
            self.one(gva)?;
        }
        Ok(())
    }

    /// Lists the whole address space.
    fn all(&mut self, limit: u64, show_progress: bool) -> Result<ExitCode, Failure> {
        let progress = RefCell::new(show_progress.then(Progress::new));
        let show = |gva: Gva, count: &str, what: &str| {
            if let Some(progress) = progress.borrow_mut().as_mut() {
                progress.show(|| format!("at {gva}: {count} {what}"));
            }
        };
        let mut mappings = Mappings::new(self.image, &self.mode)
            .on_tick(|gva, tables| show(gva, &tables.to_string(), "tables looked into"));
        for count in 0..limit {
            let Some(mapped) = mappings.next() else { break };
            if count % MAPPINGS_A_TICK == 0 {
                show(mapped.gva, &count.to_string(), "mappings");
            }
            self.out.mapped(&Answer::of_mapping(&mapped))?;
        }
        let next = mappings.next();
        if let Some(next) = next {
            self.out.truncated(next.gva.0)?;
        }
        self.out.flush()?;
        Ok(if next.is_some() { ExitCode::from(1) } else { ExitCode::SUCCESS })
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fixed part of a vCPU's state: control registers, segments, floating point, CPUID.
//!
//! Guarantee: whoever takes a vCPU finds the same state, whatever ran on it before.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_segment, kvm_sregs, kvm_xcr,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::layout::{IDT_FRAME, PAGE, STUB_VA, sel};
use super::region::{GDT_LIMIT, IDT_LIMIT, TSS_LIMIT, VcpuPages};
use super::{KvmError, stub};

// CR0: PE, MP, ET, NE, WP, PG. Not AM: a guest kernel that runs in ring 3 may set AC for its own purposes.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
// CR4: PAE, OSFXSR, OSXMMEXCPT. Not PGE, PCIDE, FSGSBASE, SMEP, SMAP.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const CR4_UMIP: u64 = 1 << 11;
const CR4_OSXSAVE: u64 = 1 << 18;
// EFER: SCE, LME, LMA, NXE. With SCE, because a software KVM is known to execute `syscall` even without.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_FMASK: u32 = 0xc000_0084;
/// RFLAGS cleared by `syscall`: TF, IF, DF, IOPL, NT, AC.
const SYSCALL_FLAGS: u64 = 0x4_7700;

/// RFLAGS that a guest program may have: CF PF AF ZF SF TF DF OF AC ID.
const FLAGS: u64 = 0x24_0dd5;
/// RFLAGS that it always has: bit 1, IF.
const FLAGS_SET: u64 = 0x202;

/// RFLAGS as the guest program is to run with them.
pub(super) fn user_flags(flags: u64) -> u64 {
    flags & FLAGS | FLAGS_SET
}

/// What KVM offers here.
#[derive(Debug)]
pub(super) struct Features {
    cpuid: CpuId,
    /// Physical address bits.
    pub(super) width: u32,
    umip: bool,
    /// XCR0, if there is XSAVE.
    xcr0: Option<u64>,
}

impl Features {
    pub(super) fn of(kvm: &Kvm) -> Result<Features, KvmError> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
        let leaf = |function, index| {
            cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).copied()
        };
        let extended = leaf(0x8000_0001, 0).unwrap_or_default().edx;
        for (bit, what) in [(29, "64-bit mode in its CPUID"), (20, "NX in its CPUID")] {
            if extended & 1 << bit == 0 {
                return Err(KvmError::MissingCapability(what));
            }
        }
        // CPUID.80000008H:EAX[7:0]; AMD's EAX[23:16] is the part that nested tables reach, if not 0.
        let sizes = leaf(0x8000_0008, 0).map_or(36, |e| e.eax);
        let guest = sizes >> 16 & 0xff;
        let width = if guest == 0 { sizes & 0xff } else { guest.min(sizes & 0xff) };
        let xsave = leaf(1, 0).is_some_and(|e| e.ecx & 1 << 26 != 0);
        let xcr0 = leaf(0xd, 0).filter(|_| xsave).map(|e| {
            let offered = u64::from(e.eax);
            // x87, SSE, AVX; AVX-512 is all three of its bits or none.
            let avx512 = if offered & 0xe4 == 0xe4 { 0xe0 } else { 0 };
            offered & (7 | avx512)
        });
        let umip = leaf(7, 0).is_some_and(|e| e.ecx & 1 << 2 != 0);
        Ok(Features { cpuid, width, umip, xcr0 })
    }

    /// What is done once in a vCPU's life. Returns its XSAVE area, to be given to `reset`.
    pub(super) fn init(&self, fd: &VcpuFd, id: usize) -> Result<Option<Box<kvm_xsave>>, KvmError> {
        let mut cpuid = self.cpuid.clone();
        for e in cpuid.as_mut_slice() {
            match e.function {
                // Initial APIC id.
                1 => e.ebx = e.ebx & 0x00ff_ffff | (id as u32) << 24,
                0xb | 0x1f => e.edx = id as u32,
                _ => {}
            }
        }
        fd.set_cpuid2(&cpuid).map_err(KvmError::call("KVM_SET_CPUID2"))?;
        match self.xcr0 {
            Some(_) => Ok(Some(Box::new(fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?))),
            None => Ok(None),
        }
    }

    /// Sets everything but the general registers; returns the special registers, for ring 0.
    pub(super) fn reset(
        &self,
        fd: &VcpuFd,
        xsave: Option<&kvm_xsave>,
        pages: &VcpuPages,
        root: u64,
    ) -> Result<kvm_sregs, KvmError> {
        let mut s = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
        s.cr0 = CR0;
        s.cr2 = 0;
        s.cr3 = root;
        s.cr4 = CR4 | if self.umip { CR4_UMIP } else { 0 };
        if self.xcr0.is_some() {
            s.cr4 |= CR4_OSXSAVE;
        }
        s.efer = EFER;
        s.cr8 = 0;
        s.interrupt_bitmap = [0; 4];
        s.gdt.base = pages.gdt;
        s.gdt.limit = GDT_LIMIT;
        s.idt.base = STUB_VA + IDT_FRAME * PAGE;
        s.idt.limit = IDT_LIMIT;
        let data = data(sel::DATA3, 3);
        (s.ds, s.es, s.fs, s.gs) = (data, data, data, data);
        ring0(&mut s);
        s.ldt = kvm_segment { unusable: 1, type_: 2, ..Default::default() };
        s.tr = kvm_segment {
            base: pages.tss,
            limit: u32::from(TSS_LIMIT),
            selector: sel::TSS,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        fd.set_sregs(&s).map_err(KvmError::call("KVM_SET_SREGS"))?;

        // SYSCALL's selectors; 64-bit and compatibility-mode entry both lead to the stub.
        let star = u64::from(sel::CODE0) << 32 | u64::from(sel::CODE3_32) << 48;
        let entries = [
            (MSR_STAR, star),
            (MSR_LSTAR, stub::syscall()),
            (MSR_CSTAR, stub::syscall()),
            (MSR_FMASK, SYSCALL_FLAGS),
        ]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
        let msrs = Msrs::from_entries(&entries).expect("four entries fit");
        let set = fd.set_msrs(&msrs).map_err(KvmError::call("KVM_SET_MSRS"))?;
        if set != entries.len() {
            return Err(KvmError::MissingCapability("the MSRs of SYSCALL"));
        }

        if let (Some(xcr0), Some(xsave)) = (self.xcr0, xsave) {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: xcr0, ..Default::default() };
            fd.set_xcrs(&xcrs).map_err(KvmError::call("KVM_SET_XCRS"))?;
            // SAFETY: no dynamically enabled feature: the area is the 4096 bytes that KVM itself
            // filled in `init`.
            unsafe { fd.set_xsave(xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
        }
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        fd.set_fpu(&fpu).map_err(KvmError::call("KVM_SET_FPU"))?;
        Ok(s)
    }
}

/// Code and stack segment of the stub.
pub(super) fn ring0(s: &mut kvm_sregs) {
    s.cs = code(sel::CODE0, 0, true);
    s.ss = data(sel::DATA0, 0);
}

/// Code and stack segment of the guest program: 64-bit, or 32-bit (compatibility mode).
pub(super) fn ring3(s: &mut kvm_sregs, long: bool) {
    s.cs = code(code3(long), 3, long);
    s.ss = data(sel::DATA3, 3);
}

/// The guest program's code selector.
pub(super) fn code3(long: bool) -> u16 {
    if long { sel::CODE3 } else { sel::CODE3_32 }
}

fn code(selector: u16, dpl: u8, long: bool) -> kvm_segment {
    kvm_segment { type_: 11, l: u8::from(long), db: u8::from(!long), ..data(selector, dpl) }
}

fn data(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: 3,
        present: 1,
        dpl,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Privileged instructions, software interrupts, and what is not executed.

use super::bus::{Bus, Class, Event, Exception};
use super::insn::{Insn, Op};
use super::memory::{Cpu, RAX, RBX, RCX, RDX, Run};

impl<B: Bus> Cpu<'_, B> {
    pub(super) fn system(&mut self, insn: &Insn) -> Run<Event, B> {
        match insn.op {
            Op::Hlt => {
                self.bus.halt()?;
                self.regs.rip = self.next;
                return Ok(Event::Halt);
            }
            Op::ReadCr => {
                let v = self.bus.read_cr(insn.cond)?;
                self.put(insn, insn.dst, 8, v)?;
            }
            Op::WriteCr => {
                let v = self.get(insn, insn.src, 8)?;
                self.bus.write_cr(insn.cond, v)?;
            }
            Op::Invlpg => {
                let gva = self.gva(&insn.mem);
                self.bus.invlpg(gva)?;
            }
            Op::Invpcid => {
                let kind = self.get(insn, insn.dst, 8)?;
                let (gva, seg) = (self.gva(&insn.mem), insn.mem.seg);
                let low = self.load(gva, 8, seg)?;
                let high = self.load(gva.wrapping_add(8), 8, seg)?;
                self.bus.invpcid(kind, [low, high])?;
            }
            Op::In => {
                let port = self.get(insn, insn.src, 2)? as u16;
                let v = self.bus.port_in(port, usize::from(insn.size))?;
                self.set_reg(RAX, insn.size, u64::from(v));
            }
            Op::Out => {
                let port = self.get(insn, insn.src, 2)? as u16;
                let v = self.reg_part(RAX, insn.size) as u32;
                self.bus.port_out(port, usize::from(insn.size), v)?;
            }
            Op::Rdmsr => {
                let v = self.bus.rdmsr(self.reg(RCX) as u32)?;
                self.set_pair(v);
            }
            Op::Wrmsr => {
                let v = self.reg(RDX) << 32 | self.reg_part(RAX, 4);
                self.bus.wrmsr(self.reg(RCX) as u32, v)?;
            }
            Op::Cpuid => {
                let r = self.bus.cpuid(self.reg(RAX) as u32, self.reg(RCX) as u32);
                for (n, v) in [RAX, RBX, RCX, RDX].into_iter().zip(r) {
                    self.set_reg(n, 4, u64::from(v));
                }
            }
            Op::Rdtsc => {
                let v = self.bus.rdtsc();
                self.set_pair(v);
            }
            Op::Int => return Err(software(insn.imm as u8, Class::Software)),
            Op::Int3 => return Err(software(3, Class::Trap)),
            Op::Int1 => return Err(software(1, Class::Trap)),
            Op::Gp => return Err(Exception::gp(0).into()),
            Op::Ud => return Err(Exception::ud().into()),
            _ => return Err(software(6, Class::Unsupported)),
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    /// edx:eax, as rdmsr and rdtsc return it.
    fn set_pair(&mut self, v: u64) {
        self.set_reg(RAX, 4, v);
        self.set_reg(RDX, 4, v >> 32);
    }
}

fn software<S>(vector: u8, class: Class) -> super::Stop<S> {
    Exception { class, ..Exception::fault(vector, None) }.into()
}
